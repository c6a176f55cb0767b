"""Command line, allocator and process start-up."""
