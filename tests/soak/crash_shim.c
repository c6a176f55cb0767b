/* Crash points: a preloaded library that counts the calls that change files under a folder, and at
 * one of them kills the process, or acts as if the disk were full from there on.
 *
 * Linux; `crash_points.py` compiles and arms it. Unlike patches of Python's `os` it sees the writes
 * of C++ libraries (Orbax, ArrayRecord) as well. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

/* BEFORE a call, in the MIDDLE of a write (or after any other call), AFTER it, or a FULL disk. */
enum { OFF, BEFORE, MIDDLE, AFTER, FULL };
static int mode = OFF;
static long target = 0;
static char folder[PATH_MAX];
static atomic_long count = 0;
static atomic_int is_full = 0;

/* Count calls under `path` from now on, and act at the n-th; 0 only counts. */
void soak_arm(int how, long n, const char *path) {
  mode = OFF;
  strncpy(folder, path, sizeof folder - 1);
  target = n;
  atomic_store(&count, 0);
  atomic_store(&is_full, 0);
  mode = how;
}

long soak_count(void) { return atomic_load(&count); }

static void die(void) {
  syscall(SYS_kill, syscall(SYS_getpid), SIGKILL);
  for (;;) pause();
}

static int is_inside(const char *path) {
  size_t length = strlen(folder);
  return mode != OFF && strncmp(path, folder, length) == 0 &&
         (path[length] == '/' || path[length] == 0);
}

static int path_of(int fd, char *out) {
  char link[64];
  snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
  ssize_t size = syscall(SYS_readlinkat, AT_FDCWD, link, out, PATH_MAX - 1);
  if (size < 0) return 0;
  out[size] = 0;
  return out[0] == '/';
}

static void join(int fd, const char *path, char *out) {
  char parent[PATH_MAX] = "";
  if (path[0] == '/') {
    snprintf(out, PATH_MAX, "%s", path);
    return;
  }
  if (fd == AT_FDCWD) {
    if (syscall(SYS_getcwd, parent, sizeof parent) < 0) parent[0] = 0;
  } else {
    path_of(fd, parent);
  }
  /* A path that does not fit is cut, and then at worst not counted. */
  if (snprintf(out, PATH_MAX, "%s/%s", parent, path) >= PATH_MAX) out[PATH_MAX - 1] = 0;
}

/* Count a call; returns 1 at the n-th, where BEFORE has killed. */
static int tick(void) {
  long number = atomic_fetch_add(&count, 1) + 1;
  if (mode == FULL && target > 0 && number >= target) atomic_store(&is_full, 1);
  if (number != target) return 0;
  if (mode == BEFORE) die();
  return 1;
}

static int on_path(int fd, const char *path) {
  char full[PATH_MAX];
  if (mode == OFF) return 0;
  join(fd, path, full);
  return is_inside(full) && tick();
}

static int on_file(int fd, int *counted) {
  char full[PATH_MAX];
  *counted = mode != OFF && fd > 2 && path_of(fd, full) && is_inside(full);
  return *counted && tick();
}

static int refuses(int fd, const char *path) {
  char full[PATH_MAX];
  if (mode != FULL || !atomic_load(&is_full)) return 0;
  join(fd, path, full);
  if (!is_inside(full)) return 0;
  errno = ENOSPC;
  return 1;
}

#define AFTER_IF(hit) \
  if ((hit) && (mode == AFTER || mode == MIDDLE)) die()
#define ON_PATH(fd, path, call)      \
  int hit = on_path(fd, path);       \
  long result = (call);              \
  AFTER_IF(hit);                     \
  return (int)result

/* ---------------------------------------------------------------------------- opening of files */

static int open_at(int fd, const char *path, int flags, mode_t rights) {
  int changes = flags & (O_WRONLY | O_RDWR | O_CREAT | O_TRUNC | O_APPEND);
  int hit = changes ? on_path(fd, path) : 0;
  if ((flags & O_CREAT) && refuses(fd, path)) return -1;
  int result = syscall(SYS_openat, fd, path, flags, rights);
  AFTER_IF(hit);
  return result;
}

#define RIGHTS                                    \
  mode_t rights = 0;                              \
  if (flags & (O_CREAT | __O_TMPFILE)) {          \
    va_list arguments;                            \
    va_start(arguments, flags);                   \
    rights = va_arg(arguments, mode_t);           \
    va_end(arguments);                            \
  }
int open(const char *path, int flags, ...) { RIGHTS return open_at(AT_FDCWD, path, flags, rights); }
int open64(const char *path, int flags, ...) {
  RIGHTS return open_at(AT_FDCWD, path, flags, rights);
}
int openat(int fd, const char *path, int flags, ...) {
  RIGHTS return open_at(fd, path, flags, rights);
}
int openat64(int fd, const char *path, int flags, ...) {
  RIGHTS return open_at(fd, path, flags, rights);
}
int creat(const char *path, mode_t rights) {
  return open_at(AT_FDCWD, path, O_CREAT | O_WRONLY | O_TRUNC, rights);
}

/* ----------------------------------------------------------------------------- writes to files */

#define ON_FILE(fd, half, call)                    \
  int counted, hit = on_file(fd, &counted);        \
  if (counted && mode == FULL && is_full) {        \
    errno = ENOSPC;                                \
    return -1;                                     \
  }                                                \
  if (hit && mode == MIDDLE) {                     \
    half;                                          \
    die();                                         \
  }                                                \
  long result = (call);                            \
  AFTER_IF(hit);                                   \
  return result

ssize_t write(int fd, const void *data, size_t size) {
  ON_FILE(fd, syscall(SYS_write, fd, data, size / 2), syscall(SYS_write, fd, data, size));
}
ssize_t pwrite(int fd, const void *data, size_t size, off_t at) {
  ON_FILE(fd, syscall(SYS_pwrite64, fd, data, size / 2, at),
          syscall(SYS_pwrite64, fd, data, size, at));
}
ssize_t pwrite64(int fd, const void *data, size_t size, off_t at) {
  return pwrite(fd, data, size, at);
}
ssize_t writev(int fd, const struct iovec *parts, int n) {
  ON_FILE(fd, n ? syscall(SYS_write, fd, parts[0].iov_base, parts[0].iov_len / 2) : 0,
          syscall(SYS_writev, fd, parts, n));
}
ssize_t sendfile(int out, int in, off_t *at, size_t size) {
  ON_FILE(out, syscall(SYS_sendfile, out, in, at, size / 2),
          syscall(SYS_sendfile, out, in, at, size));
}
ssize_t sendfile64(int out, int in, off64_t *at, size_t size) { return sendfile(out, in, at, size); }
int fsync(int fd) { ON_FILE(fd, 0, syscall(SYS_fsync, fd)); }
int fdatasync(int fd) { ON_FILE(fd, 0, syscall(SYS_fdatasync, fd)); }
int ftruncate(int fd, off_t size) { ON_FILE(fd, 0, syscall(SYS_ftruncate, fd, size)); }
int ftruncate64(int fd, off64_t size) { return ftruncate(fd, size); }

/* ---------------------------------------------------------------------------- names of files */

int renameat2(int from_fd, const char *from, int fd, const char *path, unsigned flags) {
  ON_PATH(fd, path, syscall(SYS_renameat2, from_fd, from, fd, path, flags));
}
int renameat(int from_fd, const char *from, int fd, const char *path) {
  return renameat2(from_fd, from, fd, path, 0);
}
int rename(const char *from, const char *path) {
  return renameat2(AT_FDCWD, from, AT_FDCWD, path, 0);
}
int unlinkat(int fd, const char *path, int flags) {
  ON_PATH(fd, path, syscall(SYS_unlinkat, fd, path, flags));
}
int unlink(const char *path) { return unlinkat(AT_FDCWD, path, 0); }
int rmdir(const char *path) { return unlinkat(AT_FDCWD, path, AT_REMOVEDIR); }
int mkdirat(int fd, const char *path, mode_t rights) {
  if (refuses(fd, path)) return -1;
  ON_PATH(fd, path, syscall(SYS_mkdirat, fd, path, rights));
}
int mkdir(const char *path, mode_t rights) { return mkdirat(AT_FDCWD, path, rights); }
int linkat(int from_fd, const char *from, int fd, const char *path, int flags) {
  ON_PATH(fd, path, syscall(SYS_linkat, from_fd, from, fd, path, flags));
}
int link(const char *from, const char *path) { return linkat(AT_FDCWD, from, AT_FDCWD, path, 0); }
