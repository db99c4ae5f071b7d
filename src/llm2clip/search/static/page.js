"use strict";
// Search page that shows the results of a query in a grid. The page only sends requests to the server that it was loaded
// from, using the paths /search, /heatmap, /thumbnail and /image.

const $ = (id) => document.getElementById(id);
const MAX_SIDE = 1024; // in pixels; larger images are scaled down to this size before they are sent
const MAX_IMAGES = 16; // maximum number of images per request; the server has the same limit
const query = { images: [], like: [], negativeImages: [] }; // images and negativeImages are data URIs; like contains hit ids
const DARKEST = 0.8; // opacity of the heat map over the least similar cell
let hits = [];
let searchedQuery = null; // query fields of the request that returned the hits
let openIndex = -1; // index of the hit in the detail view; -1 before the first hit is opened
let lastRequest = 0;

// ---- search ---------------------------------------------------------------------------------------------------------

function readRequest() {
  const text = $("text").value.trim(), negative = $("negative").value.trim();
  return {
    texts: text ? [text] : [],
    images: query.images,
    like: query.like,
    negative_texts: negative ? [negative] : [],
    negative_images: query.negativeImages,
    filter: {
      caption: $("caption").value.trim() || null,
      path: $("path").value.trim() || null,
      after: toSeconds($("after").value, "T00:00:00"),
      before: toSeconds($("before").value, "T23:59:59"),
    },
  };
}

function toSeconds(date, time) {
  return date ? new Date(date + time).getTime() / 1000 : null;
}

async function search(addToHistory = true) {
  const request = readRequest(), requestNumber = ++lastRequest;
  if (!request.texts.length && !request.images.length && !request.like.length) {
    showHits([]);
    showStatus("");
    $("empty").hidden = false;
    document.body.classList.remove("searching");
    return;
  }
  if (addToHistory) {
    const hash = "#" + new URLSearchParams({ q: $("text").value.trim(), like: query.like.join(",") });
    if (hash !== location.hash) history.pushState(null, "", hash);
  }
  const start = performance.now();
  document.body.classList.add("searching");
  showStatus("Searching…");
  try {
    const response = await fetch("/search", {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify(request),
    });
    const body = await response.json();
    if (requestNumber !== lastRequest) return; // a newer search has started
    if (!response.ok) throw new Error(body.error.message);
    showHits(body.hits);
    searchedQuery = (({ filter, ...fields }) => fields)(request);
    const seconds = ((performance.now() - start) / 1000).toFixed(2);
    showStatus(hits.length ? `${hits.length} images, most similar first (${seconds} s)` : "No results. Try changing the filters.");
  } catch (error) {
    if (requestNumber !== lastRequest) return;
    showHits([]);
    showStatus(error instanceof TypeError ? "The server is not responding. Is it still running?" : error.message, true);
  } finally {
    if (requestNumber === lastRequest) document.body.classList.remove("searching");
  }
}

function showStatus(text, isError = false) {
  $("status").textContent = text;
  $("status").classList.toggle("error", isError);
}

// ---- results --------------------------------------------------------------------------------------------------------

function showHits(newHits) {
  if ($("detail").open) $("detail").close(); // the dialog still shows one of the previous hits
  hits = newHits;
  $("empty").hidden = true;
  $("grid").replaceChildren(...hits.map(makeGridItem));
}

function makeGridItem(hit, index) {
  const item = document.createElement("li"), button = document.createElement("button");
  const image = document.createElement("img"), line = document.createElement("span");
  const name = document.createElement("span"), score = document.createElement("span");
  const first = hit.images[0];
  image.src = `/thumbnail/${hit.id}`;
  image.loading = "lazy";
  image.alt = first.captions[0] || first.name;
  name.className = "name";
  name.textContent = first.name.split(/[/!]/).pop();
  score.className = "score";
  score.textContent = hit.score.toFixed(3);
  line.append(name, score);
  button.append(image, line);
  button.type = "button";
  button.addEventListener("click", () => showDetail(index));
  item.append(button);
  return item;
}

function showDetail(index) {
  if (index < 0 || index >= hits.length) return;
  openIndex = index;
  hideHeatmap();
  const hit = hits[index], first = hit.images[0];
  $("large").src = `/image/${hit.id}`;
  $("large").onerror = () => { $("large").onerror = null; $("large").src = `/thumbnail/${hit.id}`; };
  $("large").alt = first.captions[0] || first.name;
  $("facts").textContent = `${hit.score.toFixed(3)} · ${hit.width} × ${hit.height} · ` +
    new Date(first.taken * 1000).toLocaleDateString();
  $("locations").replaceChildren(...hit.images.map((image) => {
    const entry = document.createElement("li");
    entry.textContent = image.name;
    for (const caption of image.captions) {
      const line = document.createElement("small");
      line.textContent = caption;
      entry.append(line);
    }
    return entry;
  }));
  $("back").disabled = index === 0;
  $("next").disabled = index === hits.length - 1;
  if (!$("detail").open) $("detail").showModal();
}

// ---- heat map -------------------------------------------------------------------------------------------------------

function hideHeatmap() {
  $("heatmap").hidden = true;
  $("where").setAttribute("aria-pressed", "false");
  showHeatmapStatus("");
}

function showHeatmapStatus(text, isError = false) {
  $("heatmap-status").textContent = text;
  $("heatmap-status").classList.toggle("error", isError);
}

async function toggleHeatmap() {
  if ($("where").getAttribute("aria-pressed") === "true") {
    hideHeatmap();
    return;
  }
  const hit = hits[openIndex];
  $("where").setAttribute("aria-pressed", "true");
  showHeatmapStatus("Computing the heat map…");
  const isCurrent = () => hits[openIndex] === hit && $("where").getAttribute("aria-pressed") === "true";
  try {
    const response = await fetch("/heatmap", {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify({ id: hit.id, ...searchedQuery }),
    });
    const body = await response.json();
    if (!isCurrent()) return;
    if (!response.ok) throw new Error(body.error.message);
    drawHeatmap(body.rows, hit);
  } catch (error) {
    if (!isCurrent()) return;
    hideHeatmap();
    showHeatmapStatus(error instanceof TypeError ? "The server is not responding. Is it still running?" : error.message, true);
  }
}

function drawHeatmap(rows, hit) {
  const values = rows.flat(), least = Math.min(...values), most = Math.max(...values);
  const cells = document.createElement("canvas"), context = cells.getContext("2d");
  cells.width = rows[0].length;
  cells.height = rows.length;
  const pixels = context.createImageData(cells.width, cells.height); // black, with a different opacity for each cell
  values.forEach((value, i) => { pixels.data[4 * i + 3] = 255 * DARKEST * (most > least ? (most - value) / (most - least) : 0); });
  context.putImageData(pixels, 0, 0);
  const canvas = $("heatmap"), scale = MAX_SIDE / Math.max(hit.width, hit.height); // same aspect ratio as the image
  canvas.width = Math.max(1, Math.round(hit.width * scale));
  canvas.height = Math.max(1, Math.round(hit.height * scale));
  canvas.getContext("2d").drawImage(cells, 0, 0, canvas.width, canvas.height);
  canvas.hidden = false;
  showHeatmapStatus(`Bright: most similar to the query (${most.toFixed(3)}). Dark: least similar (${least.toFixed(3)}).`);
}

// ---- more and less like a hit ---------------------------------------------------------------------------------------

function moreLike(hit) {
  Object.assign(query, { images: [], like: [hit.id], negativeImages: [] });
  $("text").value = "";
  $("negative").value = "";
  updateQuery();
}

async function lessLike(hit) {
  const response = await fetch(`/thumbnail/${hit.id}`);
  if (!response.ok || query.negativeImages.length >= MAX_IMAGES) return;
  query.negativeImages.push(await toDataUri(await response.blob()));
  updateQuery();
}

function updateQuery() {
  if ($("detail").open) $("detail").close();
  resizeText();
  showChips();
  scrollTo(0, 0);
  search();
}

// ---- images in the query --------------------------------------------------------------------------------------------

function toDataUri(blob) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(blob);
  });
}

async function toSmallDataUri(file) {
  // The model does not need more than MAX_SIDE pixels per side. If the browser cannot decode a file, the original is
  // sent, because the server may support its format.
  try {
    const bitmap = await createImageBitmap(file);
    const scale = Math.min(1, MAX_SIDE / Math.max(bitmap.width, bitmap.height));
    if (scale === 1) return toDataUri(file);
    const canvas = document.createElement("canvas");
    canvas.width = Math.max(1, Math.round(bitmap.width * scale));
    canvas.height = Math.max(1, Math.round(bitmap.height * scale));
    const context = canvas.getContext("2d");
    context.fillStyle = "#fff"; // transparent pixels become white, as in the index
    context.fillRect(0, 0, canvas.width, canvas.height);
    context.drawImage(bitmap, 0, 0, canvas.width, canvas.height);
    return canvas.toDataURL("image/jpeg", 0.92);
  } catch {
    return toDataUri(file);
  }
}

async function addImages(files) {
  const images = [...files].filter((file) => file.type.startsWith("image/"));
  if (!images.length) {
    showStatus("This file is not an image.", true);
    return;
  }
  query.images.push(...await Promise.all(images.map(toSmallDataUri)));
  query.images.splice(0, query.images.length - MAX_IMAGES);
  updateQuery();
}

function makeChip(source, list, entry, isNegative) {
  const chip = document.createElement("button"), image = document.createElement("img");
  chip.type = "button";
  chip.className = isNegative ? "chip negative" : "chip";
  chip.title = "Remove this image from the query";
  image.src = source;
  image.alt = isNegative ? "less like this image" : "more like this image";
  chip.append(image);
  chip.addEventListener("click", () => {
    list.splice(list.indexOf(entry), 1);
    showChips();
    search();
  });
  return chip;
}

function showChips() {
  $("chips").replaceChildren(
    ...query.like.map((id) => makeChip(`/thumbnail/${id}`, query.like, id, false)),
    ...query.images.map((uri) => makeChip(uri, query.images, uri, false)),
    ...query.negativeImages.map((uri) => makeChip(uri, query.negativeImages, uri, true)),
  );
}

// ---- keyboard and mouse ---------------------------------------------------------------------------------------------

function resizeText() {
  $("text").style.height = "auto";
  $("text").style.height = `${$("text").scrollHeight}px`;
}

$("form").addEventListener("submit", (event) => { event.preventDefault(); search(); });
$("text").addEventListener("input", resizeText);
$("text").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); search(); }
  if (event.key === "ArrowDown" && hits.length && !$("text").value.includes("\n")) { event.preventDefault(); focusHit(0); }
});
$("add").addEventListener("click", () => $("file").click());
$("file").addEventListener("change", () => { addImages($("file").files); $("file").value = ""; });
$("more").addEventListener("click", () => {
  $("filters").hidden = !$("filters").hidden;
  $("more").setAttribute("aria-expanded", String(!$("filters").hidden));
});
$("like").addEventListener("click", () => moreLike(hits[openIndex]));
$("unlike").addEventListener("click", () => lessLike(hits[openIndex]));
$("where").addEventListener("click", toggleHeatmap);
$("back").addEventListener("click", () => showDetail(openIndex - 1));
$("next").addEventListener("click", () => showDetail(openIndex + 1));
$("close").addEventListener("click", () => $("detail").close());
$("detail").addEventListener("close", () => {
  // This event fires shortly after the dialog closes. If the search box has received focus by then, do not move focus.
  const focusable = [document.body, ...$("grid").querySelectorAll("button")];
  if (hits[openIndex] && focusable.includes(document.activeElement)) focusHit(openIndex);
});
$("detail").addEventListener("click", (event) => { if (event.target === $("detail")) $("detail").close(); });

function focusHit(index) {
  const buttons = $("grid").querySelectorAll("button");
  if (buttons.length) buttons[Math.max(0, Math.min(index, buttons.length - 1))].focus();
}

document.addEventListener("keydown", (event) => {
  const isTyping = event.target.matches("input, textarea");
  if (event.ctrlKey || event.metaKey || event.altKey || isTyping) return;
  if ($("detail").open) {
    if (event.key === "ArrowLeft") showDetail(openIndex - 1);
    if (event.key === "ArrowRight") showDetail(openIndex + 1);
    if (event.key === "m") moreLike(hits[openIndex]);
    if (event.key === "w") toggleHeatmap();
    return;
  }
  if (event.key === "/") { event.preventDefault(); $("text").focus(); return; }
  const buttons = [...$("grid").querySelectorAll("button")], current = buttons.indexOf(document.activeElement);
  if (current < 0) return;
  const columns = buttons.filter((button) => button.offsetTop === buttons[0].offsetTop).length;
  const step = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -columns, ArrowDown: columns }[event.key];
  if (event.key === "m") moreLike(hits[current]);
  if (step) {
    event.preventDefault();
    if (current + step < 0) $("text").focus();
    else focusHit(current + step);
  }
});

let dragDepth = 0; // nesting depth, since dragenter and dragleave fire for every element under the pointer
addEventListener("dragenter", (event) => {
  if ([...event.dataTransfer.types].includes("Files")) { dragDepth++; $("drop").hidden = false; }
});
addEventListener("dragleave", () => { if (--dragDepth <= 0) { dragDepth = 0; $("drop").hidden = true; } });
addEventListener("dragover", (event) => event.preventDefault());
addEventListener("drop", (event) => {
  event.preventDefault();
  dragDepth = 0;
  $("drop").hidden = true;
  if (event.dataTransfer.files.length) addImages(event.dataTransfer.files);
});
addEventListener("paste", (event) => {
  if (event.clipboardData.files.length) { event.preventDefault(); addImages(event.clipboardData.files); }
});

function restoreQuery() {
  const parameters = new URLSearchParams(location.hash.slice(1));
  $("text").value = parameters.get("q") || "";
  Object.assign(query, { images: [], negativeImages: [] });
  query.like = (parameters.get("like") || "").split(",").filter(Boolean);
  resizeText();
  showChips();
  search(false);
}
addEventListener("popstate", restoreQuery);
restoreQuery();
