// Image search that runs entirely in the browser. It loads only files from its own folder. common.js defines $ and others.

import * as ort from "./lib/onnxruntime-web.js";
import { Tokenizer } from "./lib/tokenizers.js";

const PAGE = 60; // number of images to show at a time
let settings; // contents of gallery.json
let vectors; // rotated image vectors mean + scale * value: {mean: Float32Array, scales: Float32Array, values: Int8Array}
let encoder = null; // promise of {tokenizer, session}; created when the page loads
let running = Promise.resolve(); // the session runs one batch at a time
let likeIndex = null; // image of the query "more like this"
let hits = []; // all images as {index, score}, in the order of the results; score is null without a query
let shownCount = 0;
let openHit = -1; // position in `hits` of the image in the detail view
let lastSearch = 0; // number of the latest search; results of earlier searches are ignored

// ---- loading --------------------------------------------------------------------------------------------------------

async function load(name) {
  let response;
  try {
    response = await fetch(name);
  } catch {
    const advice = location.protocol === "file:"
      ? "Browsers do not load these files from a disk. Use a web server, such as python -m http.server, and open its address."
      : "Check the connection and reload the page.";
    throw new Error(`${name} could not be loaded. ${advice}`);
  }
  if (!response.ok) throw new Error(`${name} could not be loaded (status ${response.status}).`);
  return response;
}

async function loadImages() {
  const [json, binary] = await Promise.all([load("gallery.json"), load("vectors.bin")]);
  settings = await json.json();
  document.title = $("title").textContent = settings.title;
  const buffer = await binary.arrayBuffer(), { count, dim } = settings;
  const scalesStart = 4 * dim, valuesStart = scalesStart + 4 * count;
  if (buffer.byteLength !== valuesStart + count * dim) throw new Error("vectors.bin is incomplete. Upload the folder again.");
  vectors = {
    mean: new Float32Array(buffer, 0, dim),
    scales: new Float32Array(buffer, scalesStart, count),
    values: new Int8Array(buffer, valuesStart),
  };
}

async function loadEncoder() {
  ort.env.wasm.numThreads = 1; // several threads require HTTP headers that few static hosts send
  ort.env.wasm.wasmPaths = { wasm: new URL("lib/onnxruntime-web.wasm", import.meta.url).href };
  const [json, config, graph] = await Promise.all(["tokenizer.json", "tokenizer_config.json", "text.onnx"].map(load));
  const tokenizer = new Tokenizer(await json.json(), await config.json());
  for (const { text, ids } of settings.token_checks) {
    if (String(tokenizer.encode(text).ids) !== String(ids)) {
      throw new Error("The tokenizer library of this page does not support this model: its tokens differ.");
    }
  }
  const session = await ort.InferenceSession.create(await graph.arrayBuffer(), { executionProviders: ["wasm"] });
  return { tokenizer, session };
}

// ---- query vectors --------------------------------------------------------------------------------------------------

function tokenize(tokenizer, text) {
  // Truncation keeps the special tokens at the end, as in Python.
  const { ids } = tokenizer.encode(text), { max_length, final_tokens } = settings;
  if (ids.length <= max_length) return ids;
  return [...ids.slice(0, max_length - final_tokens), ...ids.slice(ids.length - final_tokens)];
}

async function embedTexts(texts) {
  // Return one L2-normalised Float32Array per text.
  const { tokenizer, session } = await encoder;
  const rows = texts.map((text) => tokenize(tokenizer, text));
  const length = Math.max(1, ...rows.map((row) => row.length)), shape = [rows.length, length];
  const ids = new BigInt64Array(rows.length * length).fill(BigInt(settings.pad_id));
  const mask = new BigInt64Array(rows.length * length);
  rows.forEach((row, i) => row.forEach((id, j) => { ids[i * length + j] = BigInt(id); mask[i * length + j] = 1n; }));
  const inputs = { input_ids: new ort.Tensor("int64", ids, shape), attention_mask: new ort.Tensor("int64", mask, shape) };
  const output = running.then(() => session.run(inputs));
  running = output.catch(() => {});
  const { data, dims } = (await output).embeddings;
  return rows.map((_, i) => normalize(data.slice(i * dims[1], i * dims[1] + settings.dim)));
}

function normalize(vector) {
  const norm = Math.max(Math.hypot(...vector), 1e-12);
  return vector.map((value) => value / norm);
}

function isShort(text) {
  // Same rule as `is_short_text` in llm2clip.
  const characters = [...text], { max_words, max_characters, wide_ranges } = settings;
  if (characters.length > max_characters) return false;
  const isWide = (code) => wide_ranges.some(([first, last]) => first <= code && code <= last);
  const wideCount = characters.filter((character) => isWide(character.codePointAt(0))).length;
  return text.trim().split(/\s+/).length <= max_words && wideCount <= 2 * max_words;
}

async function embedQuery(text) {
  // Return the L2-normalised mean over the text and, if it is short, the model's prompt templates.
  const prompts = [text];
  if (isShort(text)) prompts.push(...settings.templates.map((template) => template.replaceAll("{}", () => text)));
  const embeddings = await embedTexts(prompts);
  return normalize(embeddings[0].map((_, d) => embeddings.reduce((sum, embedding) => sum + embedding[d], 0)));
}

function rotate(vector) {
  // Discrete Hartley transform, as in `make_hartley_matrix` in llm2clip. Image vectors are stored rotated.
  const dim = vector.length, table = new Float64Array(dim);
  for (let n = 0; n < dim; n++) {
    const angle = 2 * Math.PI * n / dim;
    table[n] = (Math.cos(angle) + Math.sin(angle)) / Math.sqrt(dim);
  }
  return vector.map((_, k) => vector.reduce((sum, value, n) => sum + value * table[(n * k) % dim], 0));
}

function getRotatedImageVector(index) {
  const { dim } = settings, { mean, scales, values } = vectors;
  return normalize(mean.map((value, d) => value + values[index * dim + d] * scales[index]));
}

// ---- search ---------------------------------------------------------------------------------------------------------

function rankImages(query) {
  // `query` is rotated.
  const { count, dim } = settings, { mean, scales, values } = vectors;
  const scores = new Float32Array(count), meanScore = query.reduce((sum, value, d) => sum + value * mean[d], 0);
  for (let i = 0; i < count; i++) {
    let sum = 0;
    for (let d = 0, position = i * dim; d < dim; d++, position++) sum += query[d] * values[position];
    scores[i] = meanScore + sum * scales[i];
  }
  const order = Array.from(scores.keys()).sort((a, b) => scores[b] - scores[a]);
  return order.map((index) => ({ index, score: scores[index] }));
}

async function search(addToHistory = true) {
  const text = $("text").value.trim(), searchNumber = ++lastSearch;
  if (text) likeIndex = null;
  showChip();
  if (addToHistory) updateUrl();
  if (!text && likeIndex === null) {
    showHits(settings.images.map((_, index) => ({ index, score: null })));
    showStatus(`${settings.count.toLocaleString("en")} images, newest first`);
    document.body.classList.remove("searching");
    return;
  }
  document.body.classList.add("searching");
  try {
    let query;
    if (likeIndex !== null) query = getRotatedImageVector(likeIndex);
    else {
      showStatus("Loading the text encoder…"); // replaced at once if it is loaded
      await encoder;
      query = rotate(await embedQuery(text));
    }
    if (searchNumber !== lastSearch) return; // a newer search has started
    const start = performance.now();
    showHits(rankImages(query));
    // A gallery has no calibration of relevance.
    showStatus(`${settings.count.toLocaleString("en")} images, most similar first. Perhaps none of them is close to the query.`);
    document.body.dataset.rankingTime = performance.now() - start;
  } catch (error) {
    if (searchNumber === lastSearch) showStatus(error.message, true);
  } finally {
    if (searchNumber === lastSearch) document.body.classList.remove("searching");
  }
}

// ---- URL ------------------------------------------------------------------------------------------------------------

function updateUrl() {
  const parameters = new URLSearchParams(), text = $("text").value.trim();
  if (text) parameters.set("q", text);
  if (likeIndex !== null) parameters.set("like", likeIndex);
  const hash = String(parameters) && `#${parameters}`;
  if (hash !== location.hash) history.pushState(null, "", hash || location.pathname + location.search);
}

function restoreQuery() {
  const parameters = new URLSearchParams(location.hash.slice(1)), like = Number(parameters.get("like") ?? NaN);
  $("text").value = parameters.get("q") || "";
  likeIndex = Number.isInteger(like) && like >= 0 && like < settings.count ? like : null;
  resizeText();
  search(false);
}

// ---- results --------------------------------------------------------------------------------------------------------

function getThumbnail(index) {
  return `thumbnails/${index}.jpg`;
}

function showHits(newHits) {
  if ($("detail").open) $("detail").close(); // the dialog still shows a hit of the previous search
  hits = newHits;
  shownCount = 0;
  $("grid").replaceChildren();
  showMore();
}

function showMore() {
  const hasFocus = document.activeElement === $("show-more"), first = shownCount;
  shownCount = Math.min(hits.length, shownCount + PAGE);
  $("grid").append(...hits.slice(first, shownCount).map((hit, offset) => makeGridItem(hit, first + offset)));
  $("show-more").hidden = shownCount === hits.length;
  if (hasFocus) focusHit(first);
}

function makeGridItem(hit, position) {
  const item = document.createElement("li"), button = document.createElement("button");
  const image = document.createElement("img"), line = document.createElement("span");
  const name = document.createElement("span"), score = document.createElement("span");
  const [fileName, caption] = settings.images[hit.index];
  image.src = getThumbnail(hit.index);
  image.loading = "lazy";
  image.alt = caption || fileName;
  name.className = "name";
  name.textContent = fileName;
  score.className = "score";
  score.textContent = hit.score === null ? "" : hit.score.toFixed(3);
  score.title = hit.score === null ? "" : "Similarity to the query, at most 1";
  line.append(name, score);
  button.append(image, line);
  button.type = "button";
  button.addEventListener("click", () => showDetail(position));
  item.append(button);
  return item;
}

function showDetail(position) {
  if (position < 0 || position >= shownCount) return;
  openHit = position;
  const hit = hits[position], [fileName, caption, details] = settings.images[hit.index];
  $("large").src = getThumbnail(hit.index);
  $("large").alt = caption || fileName;
  const facts = [...(hit.score === null ? [] : [`similarity ${hit.score.toFixed(3)}`]), ...details.map(([text, url]) => makeDetail({ text, url }))];
  showFacts(facts);
  $("name").textContent = fileName;
  $("caption").textContent = caption;
  $("back").disabled = position === 0;
  $("next").disabled = position === shownCount - 1;
  if (!$("detail").open) $("detail").showModal();
}

function searchMoreLike(position) {
  likeIndex = hits[position].index;
  $("text").value = "";
  resizeText();
  scrollTo(0, 0);
  search();
}

function showChip() {
  $("chips").replaceChildren();
  if (likeIndex === null) return;
  const chip = document.createElement("button"), image = document.createElement("img");
  chip.type = "button";
  chip.className = "chip";
  chip.title = "Remove this image from the query";
  image.src = getThumbnail(likeIndex);
  image.alt = "more like this image";
  chip.append(image);
  chip.addEventListener("click", () => { likeIndex = null; search(); });
  $("chips").append(chip);
}

// ---- keyboard -------------------------------------------------------------------------------------------------------

function focusHit(position) {
  const buttons = $("grid").querySelectorAll("button");
  if (buttons.length) buttons[Math.max(0, Math.min(position, buttons.length - 1))].focus();
}

function handleKey(event) {
  if (event.ctrlKey || event.metaKey || event.altKey || event.target.matches("textarea")) return;
  if ($("detail").open) {
    if (event.key === "ArrowLeft") showDetail(openHit - 1);
    if (event.key === "ArrowRight") showDetail(openHit + 1);
    if (event.key === "m") searchMoreLike(openHit);
    return;
  }
  if (event.key === "/") { event.preventDefault(); $("text").focus(); return; }
  const buttons = [...$("grid").querySelectorAll("button")], current = buttons.indexOf(document.activeElement);
  if (current < 0) return;
  const columns = buttons.filter((button) => button.offsetTop === buttons[0].offsetTop).length;
  const step = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -columns, ArrowDown: columns }[event.key];
  if (event.key === "m") searchMoreLike(current);
  if (step) {
    event.preventDefault();
    if (current + step < 0) $("text").focus();
    else focusHit(current + step);
  }
}

function addListeners() {
  $("form").addEventListener("submit", (event) => { event.preventDefault(); search(); });
  $("show-more").addEventListener("click", showMore);
  $("text").addEventListener("input", resizeText);
  $("text").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); search(); }
    if (event.key === "ArrowDown" && hits.length && !$("text").value.includes("\n")) { event.preventDefault(); focusHit(0); }
  });
  $("like").addEventListener("click", () => searchMoreLike(openHit));
  $("back").addEventListener("click", () => showDetail(openHit - 1));
  $("next").addEventListener("click", () => showDetail(openHit + 1));
  $("close").addEventListener("click", () => $("detail").close());
  $("detail").addEventListener("close", () => {
    const focusable = [document.body, ...$("grid").querySelectorAll("button")];
    if (focusable.includes(document.activeElement)) focusHit(openHit);
  });
  $("detail").addEventListener("click", (event) => { if (event.target === $("detail")) $("detail").close(); });
  document.addEventListener("keydown", handleKey);
  addEventListener("popstate", restoreQuery);
}

// ---- start ----------------------------------------------------------------------------------------------------------

try {
  showStatus("Loading…");
  await loadImages();
  encoder = loadEncoder();
  encoder.catch(() => {}); // a search shows the error
  addListeners();
  restoreQuery();
  window.gallery = { embedQuery, rotate, rankImages }; // for scripts and tests
} catch (error) {
  showStatus(error.message, true);
}
