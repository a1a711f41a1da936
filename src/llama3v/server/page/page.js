// The page at /: pictures and questions to /v1/chat/completions. No library, nothing from elsewhere, nothing is stored but
// the theme and, until the tab is closed, the key.
"use strict";

const at = (id) => document.getElementById(id);
const LARGEST = 20 * 2 ** 20;
let messages = []; // the conversation, as the API takes it
let waiting = []; // pictures of the next question: {name, type, url}
let working = null; // the AbortController of the answer that is being made
let model = "";

// ---- pictures

async function add(files) {
  for (const file of files) {
    if (!file.type.startsWith("image/")) continue;
    if (file.size > LARGEST) { note(`${file.name}: more than 20 MB`); continue; }
    const url = await new Promise((resolve, reject) => {
      const reader = new FileReader();
      reader.onload = () => resolve(reader.result);
      reader.onerror = () => reject(reader.error);
      reader.readAsDataURL(file);
    });
    waiting.push({ name: file.name || "picture", type: file.type, url });
  }
  showWaiting();
  at("question").focus();
}

function figure(picture) {
  const box = document.createElement("figure");
  const image = document.createElement("img");
  image.src = picture.url;
  image.alt = picture.name;
  box.append(image);
  return box;
}

function showWaiting() {
  at("waiting").replaceChildren(...waiting.map((picture, place) => {
    const box = figure(picture);
    const remove = document.createElement("button");
    remove.type = "button";
    remove.className = "secondary";
    remove.textContent = "×";
    remove.setAttribute("aria-label", `Remove ${picture.name}`);
    remove.onclick = () => { waiting.splice(place, 1); showWaiting(); };
    box.append(remove);
    return box;
  }));
}

function showCuts(box, grid) {
  const [columns, rows] = grid.split("x").map(Number);
  if (columns * rows < 2) return;
  const cuts = document.createElement("div");
  cuts.className = "cuts";
  cuts.style.gridTemplate = `repeat(${rows}, 1fr) / repeat(${columns}, 1fr)`;
  cuts.append(...Array.from({ length: columns * rows }, () => document.createElement("i")));
  box.append(cuts);
}

// ---- the conversation

function show(role, text, pictures = []) {
  at("hint")?.remove();
  const article = at("turn").content.firstElementChild.cloneNode(true);
  article.classList.add(role);
  article.querySelector(".said").textContent = text;
  article.querySelector(".pictures").append(...pictures.map(figure));
  at("talk").append(article);
  article.scrollIntoView({ block: "end" });
  return article;
}

function note(text) {
  show("error", text);
}

function request() {
  const number = (id, otherwise) => (Number.isFinite(at(id).valueAsNumber) ? at(id).valueAsNumber : otherwise);
  return {
    model,
    messages,
    max_completion_tokens: number("tokens", 256),
    temperature: number("temperature", 0),
    stream: true,
    stream_options: { include_usage: true },
  };
}

function headers() {
  const key = at("key").value.trim();
  return { "Content-Type": "application/json", ...(key && { Authorization: `Bearer ${key}` }) };
}

async function ask(event) {
  event?.preventDefault();
  const text = at("question").value.trim();
  if (working || (!text && !waiting.length)) return;
  const pictures = waiting;
  const parts = pictures.map(({ url }) => ({ type: "image_url", image_url: { url, detail: at("detail").value } }));
  const before = messages;
  messages = [...messages, { role: "user", content: [...parts, { type: "text", text }] }];
  const asked = show("user", text, pictures);
  const answer = show("assistant", "");
  const said = answer.querySelector(".said");
  const curl = asCurl(request(), pictures);
  waiting = [];
  showWaiting();
  at("question").value = "";
  busy(new AbortController());
  said.classList.add("working");
  try {
    await stream(answer, asked, working.signal);
    messages = [...messages, { role: "assistant", content: said.textContent }];
  } catch (error) {
    if (error.name === "AbortError" && said.textContent) {
      messages = [...messages, { role: "assistant", content: said.textContent }];
    } else {
      messages = before; // a question without an answer is no part of the conversation
      if (error.name !== "AbortError") answer.classList.add("error");
      said.textContent += error.name === "AbortError" ? "stopped" : error.message;
    }
  } finally {
    said.classList.remove("working");
    busy(null);
    answer.querySelector("footer").hidden = false;
    answer.scrollIntoView({ block: "end" });
    answer.querySelector(".copy").onclick = (click) => copy(curl, click.target);
    at("question").focus();
  }
}

async function stream(answer, asked, signal) {
  const options = { method: "POST", headers: headers(), body: JSON.stringify(request()), signal };
  const response = await fetch("v1/chat/completions", options);
  if (!response.ok) throw new Error((await response.json()).error.message);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  const started = performance.now();
  for (let held = "", part = await reader.read(); !part.done; part = await reader.read()) {
    const events = (held + part.value).split("\n\n");
    held = events.pop();
    for (const line of events) {
      if (!line.startsWith("data: ") || line === "data: [DONE]") continue;
      take(JSON.parse(line.slice(6)), answer, asked, started);
    }
  }
}

function take(data, answer, asked, started) {
  if (data.error) throw new Error(data.error.message);
  for (const choice of data.choices) answer.querySelector(".said").textContent += choice.delta.content ?? "";
  if (innerHeight + scrollY > document.body.scrollHeight - 200) answer.scrollIntoView({ block: "end" }); // else they read above
  if (!data.usage) return;
  const { timings, usage } = data;
  const count = (number, word) => `${number} ${word}${number === 1 ? "" : "s"}`;
  const seconds = (value) => (value < 0.0005 ? "0 ms" : value < 1 ? `${Math.round(value * 1000)} ms` : `${value.toFixed(1)} s`);
  const words = [
    timings.images && `${count(timings.tiles, "tile")}, ${count(timings.visual_tokens, "visual token")}`,
    timings.images && (timings.images_cached === timings.images ? "vision known" : `vision ${seconds(timings.vision_seconds)}`),
    `prompt ${count(usage.prompt_tokens, "token")}, ${seconds(timings.prefill_seconds)}`,
    `answer ${count(usage.completion_tokens, "token")}, ${seconds(timings.decode_seconds)}`,
    `in all ${seconds((performance.now() - started) / 1000)}`,
  ];
  answer.querySelector(".timings").textContent = words.filter(Boolean).join(" · ");
  const figures = [...document.querySelectorAll("article.user figure")];
  figures.slice(-asked.querySelectorAll("figure").length || figures.length).forEach((box, place, all) => {
    if (!box.querySelector(".cuts")) showCuts(box, timings.grids.slice(-all.length)[place] ?? "1x1");
  });
}

function busy(controller) {
  working = controller;
  at("stop").hidden = !controller;
  at("send").disabled = Boolean(controller);
}

// ---- the same with curl

function asCurl(body, pictures) {
  const names = [];
  const text = JSON.stringify({ ...body, stream: false, stream_options: undefined }, (name, value) => {
    if (name !== "url" || typeof value !== "string" || !value.startsWith("data:")) return value;
    const picture = pictures.find(({ url }) => url === value) ?? { name: "earlier-picture", type: value.slice(5).split(";")[0] };
    names.push(picture.name);
    return `data:${picture.type};base64,\u0001`;
  });
  const quoted = (word) => `'${word.replaceAll("'", "'\\''")}'`;
  const format = text.replaceAll("\\u0001", "\u0001").replaceAll("\\", "\\\\").replaceAll("%", "%%").replaceAll("\u0001", "%s");
  const files = names.map((name) => ` "$(base64 < ${quoted(name)} | tr -d '\\n')"`).join("");
  const key = at("key").value.trim() ? " -H 'Authorization: Bearer YOUR-KEY'" : "";
  const url = new URL("v1/chat/completions", location.href);
  return `printf ${quoted(format)}${files} |\ncurl ${url} -H 'Content-Type: application/json'${key} -d @-`;
}

async function copy(text, button) {
  const shown = button.textContent;
  try {
    await navigator.clipboard.writeText(text);
    button.textContent = "Copied";
  } catch { // no permission, or no secure context: show it instead
    note(text);
    button.textContent = "Shown below";
  }
  setTimeout(() => { button.textContent = shown; }, 1500);
}

// ---- the page

function reset() {
  working?.abort();
  messages = [];
  waiting = [];
  showWaiting();
  at("talk").replaceChildren();
  at("question").focus();
}

async function start() {
  const theme = localStorage.getItem("theme");
  if (theme) document.documentElement.dataset.theme = theme;
  at("key").value = sessionStorage.getItem("key") ?? "";
  try {
    const response = await fetch("v1/models", { headers: headers() });
    model = response.ok ? (await response.json()).data[0].id : undefined;
    at("model").textContent = model ?? "needs an API key: see Options";
    if (!model) document.querySelector("details").open = true;
  } catch {
    at("model").textContent = "the server does not answer";
  }
}

at("ask").addEventListener("submit", ask);
at("stop").addEventListener("click", () => working?.abort());
at("reset").addEventListener("click", reset);
at("key").addEventListener("change", () => { sessionStorage.setItem("key", at("key").value.trim()); start(); });
at("theme").addEventListener("click", () => {
  const dark = document.documentElement.dataset.theme ?? (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light");
  localStorage.setItem("theme", (document.documentElement.dataset.theme = dark === "dark" ? "light" : "dark"));
});
at("question").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) ask(event);
  if (event.key === "Escape") working?.abort();
});
for (const id of ["file", "camera"]) {
  at(id).addEventListener("change", (event) => { add([...event.target.files]); event.target.value = ""; });
  at(id).parentElement.addEventListener("keydown", (event) => {
    if (event.key === "Enter" || event.key === " ") { event.preventDefault(); at(id).click(); }
  });
}
document.addEventListener("paste", (event) => { if (event.clipboardData.files.length) add([...event.clipboardData.files]); });
document.addEventListener("dragover", (event) => { event.preventDefault(); at("ask").classList.add("over"); });
document.addEventListener("dragleave", () => at("ask").classList.remove("over"));
document.addEventListener("drop", (event) => {
  event.preventDefault();
  at("ask").classList.remove("over");
  add([...event.dataTransfer.files]);
});
start();
