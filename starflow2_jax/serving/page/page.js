"use strict";
// The conversation is a list of messages as /v1/chat/completions takes them. It is kept in this tab's storage.

const byId = (id) => document.getElementById(id);
const [thread, composer, text, files, attached, send] =
  ["thread", "composer", "text", "files", "attached", "send"].map(byId);
const SETTINGS = ["modalities", "guidance", "temperature", "seed", "n", "key"];
let messages = [];
let pending = []; // data: URLs of attached images
let running = null; // the AbortController of the answer in progress

function element(tag, className = "", content = "") {
  const node = document.createElement(tag);
  node.className = className;
  node.textContent = content;
  return node;
}

function button(label, onClick) {
  const node = element("button", "", label);
  node.type = "button";
  node.addEventListener("click", onClick);
  return node;
}

function save() {
  try {
    sessionStorage.setItem("messages", JSON.stringify(messages));
    for (const id of SETTINGS) sessionStorage.setItem(id, byId(id).value);
  } catch { /* The storage is full or switched off; the page works without it. */ }
}

function load() {
  try {
    messages = JSON.parse(sessionStorage.getItem("messages") || "[]");
    for (const id of SETTINGS) byId(id).value = sessionStorage.getItem(id) ?? byId(id).value;
  } catch { messages = []; }
  messages.forEach(show);
}

// ------------------------------------------------------------------------------------ the thread

const nats = (value) => (value === undefined ? "" : `${value.toFixed(1)} nats`);

function addImage(bubble, url, value) {
  const image = element("img");
  image.src = url;
  image.alt = value === undefined ? "attached image" : "drawn image";
  const note = element("div", "note", nats(value));
  note.append(button("Edit", () => { attach(url); text.focus(); }));
  const link = element("a", "", "Save");
  link.href = url;
  link.download = "starflow2.png";
  note.append(link);
  bubble.append(image, note);
}

// Show the parts of an answer, or the content of another message, in a bubble.
function fill(bubble, message) {
  bubble.replaceChildren();
  if (typeof message.content === "string" && !message.images?.length && !message.parts?.length) {
    bubble.textContent = message.content;
  } else if (message.role === "user") {
    for (const part of message.content) {
      if (part.type === "text") bubble.append(element("div", "", part.text));
      else addImage(bubble, part.image_url.url);
    }
  } else {
    for (const part of message.parts) {
      if (part.type === "image") {
        addImage(bubble, message.images[part.image].image_url.url, part.log_likelihood);
      } else {
        bubble.append(element("div", "", part.text), element("div", "note", nats(part.log_likelihood)));
      }
    }
    if (message.open) bubble.append(element("div", "", message.open));
  }
}

function show(message) {
  const node = element("div", `message ${message.role}`);
  const bubble = element("div", "bubble");
  fill(bubble, message);
  node.append(bubble);
  thread.append(node);
  thread.scrollTop = thread.scrollHeight;
  return node;
}

function showError(reason) {
  const node = show({ role: "assistant", content: reason });
  node.classList.add("error");
  node.setAttribute("role", "alert");
}

// -------------------------------------------------------------------------------- attached images

function attach(url) {
  pending.push(url);
  const image = element("img");
  image.src = url;
  image.alt = "attached image; press to remove";
  const node = button("", () => {
    pending = pending.filter((other) => other !== url);
    node.remove();
  });
  node.append(image);
  attached.append(node);
}

function attachFiles(list) {
  for (const file of list) {
    if (!/^image\/(png|jpeg|webp)$/.test(file.type)) continue;
    const reader = new FileReader();
    reader.onload = () => attach(reader.result);
    reader.readAsDataURL(file);
  }
}

files.addEventListener("change", () => { attachFiles(files.files); files.value = ""; });
document.addEventListener("paste", (event) => attachFiles(event.clipboardData.files));
document.addEventListener("dragover", (event) => { event.preventDefault(); composer.classList.add("over"); });
document.addEventListener("dragleave", () => composer.classList.remove("over"));
document.addEventListener("drop", (event) => {
  event.preventDefault();
  composer.classList.remove("over");
  attachFiles(event.dataTransfer.files);
});

// ----------------------------------------------------------------------------------- the answers

function requestBody() {
  const body = { messages, stream: true, modalities: byId("modalities").value.split(",") };
  for (const id of ["guidance", "temperature", "seed", "n"]) {
    const value = byId(id).value;
    if (value !== "") body[id] = Number(value);
  }
  return body;
}

function headers() {
  const key = byId("key").value;
  return { "Content-Type": "application/json", ...(key && { Authorization: `Bearer ${key}` }) };
}

async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let buffer = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    buffer += value;
    const lines = buffer.split("\n\n");
    buffer = lines.pop();
    for (const line of lines) if (line !== "data: [DONE]") yield JSON.parse(line.slice(6));
  }
}

function addDelta(message, delta) {
  message.content += delta.content ?? "";
  message.open += delta.content ?? "";
  message.images.push(...(delta.images ?? []));
  for (const part of delta.parts ?? []) {
    message.parts.push(part);
    if (part.type === "text") message.open = "";
  }
}

// Order candidates by their likelihood, and let the user choose the one that the conversation goes on with.
function rank(node, candidates, index) {
  const choose = (chosen) => {
    const { open, nats: total, ...message } = chosen.message;
    messages[index] = message;
    for (const other of candidates) other.node.classList.toggle("chosen", other === chosen);
    save();
  };
  candidates.sort((a, b) => b.message.nats - a.message.nats);
  candidates.forEach((candidate, place) => {
    node.append(candidate.node);
    if (candidates.length === 1) return;
    const note = element("div", "note", `${place + 1}. ${nats(candidate.message.nats)}`);
    note.append(button("Use this one", () => choose(candidate)));
    candidate.node.append(note);
  });
  choose(candidates[0]);
}

async function answer() {
  const body = requestBody();
  running = new AbortController();
  send.textContent = "Stop";
  const node = element("div", "message assistant");
  thread.append(node);
  const candidates = Array.from({ length: body.n ?? 1 }, () => {
    const candidate = { node: element("div", "candidate"), bubble: element("div", "bubble", "…") };
    candidate.message = { role: "assistant", content: "", images: [], parts: [], open: "", nats: -Infinity };
    candidate.node.append(candidate.bubble);
    node.append(candidate.node);
    return candidate;
  });
  try {
    const options = { method: "POST", headers: headers(), body: JSON.stringify(body), signal: running.signal };
    const response = await fetch("v1/chat/completions", options);
    if (!response.ok) throw new Error((await response.json()).error.message);
    for await (const event of events(response)) {
      if (event.error) throw new Error(event.error.message);
      for (const choice of event.choices) {
        const { message, bubble } = candidates[choice.index];
        addDelta(message, choice.delta);
        if (choice.log_likelihood !== undefined) message.nats = choice.log_likelihood;
        fill(bubble, message);
      }
      thread.scrollTop = thread.scrollHeight;
    }
  } catch (error) {
    if (error.name !== "AbortError") showError(error.message);
  } finally {
    running = null;
    send.textContent = "Send";
  }
  const complete = candidates.filter(({ message }) => message.parts.length);
  if (complete.length) rank(node, complete, messages.length);
  else node.remove();
  save();
}

composer.addEventListener("submit", (event) => {
  event.preventDefault();
  if (running) { running.abort(); return; }
  const content = pending.map((url) => ({ type: "image_url", image_url: { url } }));
  if (text.value.trim()) content.push({ type: "text", text: text.value.trim() });
  if (!content.length) return;
  const message = { role: "user", content };
  messages.push(message);
  show(message);
  text.value = "";
  text.style.height = "";
  pending = [];
  attached.replaceChildren();
  save();
  answer();
});

text.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    if (!running) composer.requestSubmit();
  }
});
text.addEventListener("input", () => {
  text.style.height = "";
  text.style.height = `${text.scrollHeight}px`;
});
document.addEventListener("keydown", (event) => { if (event.key === "Escape") running?.abort(); });
byId("clear").addEventListener("click", () => {
  running?.abort();
  messages = [];
  thread.replaceChildren();
  save();
  text.focus();
});

load();
fetch("v1/models", { headers: headers() })
  .then((response) => response.json())
  .then((models) => { byId("model").textContent = models.data?.[0]?.id ?? ""; })
  .catch(() => {});
