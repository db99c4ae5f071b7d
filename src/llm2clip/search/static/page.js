"use strict";
// Search page that shows query results in a grid. It sends requests only to its own server, to the paths /search,
// /heatmap, /explain, /thumbnail and /image. common.js is shared with galleries, selection.js selects results,
// and start.js fills the first screen.

const MAX_SIDE = 1024; // in pixels; larger images are scaled down before upload
const MAX_IMAGES = 16; // maximum number of images per request; the server has the same limit
const MAX_UPLOAD = 20 << 20; // in bytes; limit for files that the browser cannot decode, which are sent unchanged
const PAGE_SIZE = 100; // number of results to load when the user scrolls to the end
const MIN_SWIPE = 50; // in CSS pixels
const ROWS = 6; // number of rows of results in each block of the grid; the browser renders only the blocks near the window
const query = { images: [], like: [], negativeLike: [] }; // images contains {uri, name}; the other lists contain hit ids
const filterInputs = [...document.querySelectorAll("[data-filter]")]; // the server adds them; ids are names of filters
const filterIds = Object.fromEntries(filterInputs.map((input) => [input.id, input.id]));
const FIELDS = { q: "text", without: "negative", ...filterIds, words: "words", group: "group" }; // URL parameter -> id of the input element
const FILTER_LABELS = { negative: "without", ...Object.fromEntries(filterInputs.map((input) => [input.id, input.dataset.label])),
  words: "words:", group: "group similar images:" };
const DARKEST = 0.8; // opacity of the heat map over the least similar cell
let hits = [];
let tiles = []; // elements of the hits
let columns = 1; // number of columns of the grid
let searchedRequest = null; // search request that returned `hits`
let nextOffset = null; // `offset` of the request for further results; null if there are none
let total = 0; // number of images in the index that match the filter of searchedRequest
let tabStop = null; // button of the only result that the Tab key reaches; the arrow keys reach the others
let openIndex = -1; // index of the hit in the detail view; -1 until a hit is opened
let isLoading = false; // true while the next results are being loaded
let lastRequest = 0; // number of the latest search; results of earlier searches are ignored

// ---- search ---------------------------------------------------------------------------------------------------------

const getValue = (id) => $(id).value.trim();

function readRequest() {
  return {
    texts: getValue("text") ? [getValue("text")] : [],
    images: query.images.map((image) => image.uri),
    like: [...query.like],
    negative_texts: getValue("negative") ? [getValue("negative")] : [],
    negative_like: [...query.negativeLike],
    words: !getValue("words"),
    group_similar: !getValue("group"),
    filter: Object.fromEntries(filterInputs.map((input) => [input.id, readFilter(input)])),
  };
}

function readFilter(input) {
  const value = input.value.trim();
  if (!value) return null;
  switch (input.dataset.filter) {
    case "number": return Number(value);
    case "first time": return new Date(`${value}T00:00:00`).getTime() / 1000;
    case "last time": return new Date(`${value}T23:59:59`).getTime() / 1000;
    default: return value;
  }
}

function getQueryFields({ texts, images, like, negative_texts, negative_like }) {
  return { texts, images, like, negative_texts, negative_like };
}

function hasPositivePart(request) {
  return request.texts.length > 0 || request.images.length > 0 || request.like.length > 0;
}

function hasQuery(request) {
  return hasPositivePart(request) || request.negative_texts.length > 0 || request.negative_like.length > 0;
}

async function postJson(path, body) {
  const options = { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body) };
  let response;
  try {
    response = await fetch(path, options);
  } catch {
    throw new Error("The server is not responding. Is it still running?");
  }
  if (response.status === 401) throw new Error("Your session has ended. Reload this page to start a new one.");
  const answer = await response.json();
  if (!response.ok) throw Object.assign(new Error(answer.error.message), { param: answer.error.param });
  return answer;
}

function search(addToHistory = true) {
  const request = readRequest();
  showChips();
  if (addToHistory) updateUrl();
  if (hasQuery(request) || Object.values(request.filter).some((condition) => condition !== null)) return runSearch(request);
  lastRequest++; // results of a search in progress are ignored
  searchedRequest = null;
  showHits([]);
  showStatus("");
  document.body.classList.remove("searching");
  showStart();
}

async function runSearch(request) {
  const start = performance.now(), requestNumber = ++lastRequest;
  document.body.classList.add("searching");
  showStatus("Searching…");
  try {
    const answer = await postJson("/search", request);
    if (requestNumber !== lastRequest) return; // a newer search has started
    searchedRequest = request;
    ({ total, next_offset: nextOffset } = answer);
    showHits(answer.hits);
    showCount(start, answer);
    watchEnd();
  } catch (error) {
    if (requestNumber !== lastRequest) return;
    if (removeRejectedImage(error)) {
      search();
      return;
    }
    showHits([]);
    showStatus(error.message, true);
  } finally {
    if (requestNumber === lastRequest) document.body.classList.remove("searching");
  }
}

async function showMore(moveFocus) {
  if (isLoading) return;
  const start = performance.now(), requestNumber = lastRequest;
  const request = { ...searchedRequest, offset: nextOffset, top: PAGE_SIZE };
  isLoading = true;
  try {
    const answer = await postJson("/search", request);
    if (requestNumber === lastRequest) {
      const ids = new Set(hits.map((hit) => hit.id)); // hits already shown are skipped: the index may have changed
      const newHits = answer.hits.filter((hit) => !ids.has(hit.id)), first = hits.length;
      hits.push(...newHits);
      tiles.push(...newHits.map((hit, index) => makeTile(hit, first + index)));
      addToGrid(first);
      ({ total, next_offset: nextOffset } = answer);
      showCount(start, answer);
      if (moveFocus) focusHit(first);
    }
    watchEnd();
  } catch (error) {
    if (requestNumber === lastRequest) showStatus(error.message, true);
  } finally {
    isLoading = false;
  }
}

// Results load before the user scrolls to the end. The button remains for keyboards, screen readers and errors.
const endObserver = new IntersectionObserver((entries) => {
  if (entries.some((entry) => entry.isIntersecting)) showMore(false);
}, { rootMargin: "1000px" });

function watchEnd() {
  endObserver.disconnect(); // the observer reports a button again only if it is observed again
  endObserver.observe($("show-more"));
}

function showCount(start, { nothing_close: nothingClose }) {
  const isHidden = nothingClose && !hits.length;
  $("show-weak").hidden = !isHidden;
  if (isHidden) {
    showStatus("Nothing in the index is close to this query.");
    $("show-more").hidden = true;
    return;
  }
  const time = `${((performance.now() - start) / 1000).toFixed(2)} s`;
  const shown = hits.reduce((sum, hit) => sum + 1 + hit.similar.length, 0);
  const count = shown < total ? `${shown.toLocaleString("en")} of ${total.toLocaleString("en")}` : shown;
  const images = nothingClose ? "images, none of them close to the query" : "images";
  const isUnrated = hasPositivePart(searchedRequest) && hits.length && hits[0].relevance === null;
  const unrated = isUnrated ? ". Relevance is not calibrated for this index: perhaps none of them is close to the query" : "";
  const summary = `${count} ${images}, ${describeOrder()} (${time})${unrated}`;
  showStatus(hits.length ? summary : "No results. Try different filters.");
  $("show-more").hidden = nextOffset === null;
  $("save").hidden = !location.hash || searchedRequest.images.length > 0;
}

function describeOrder() {
  if (!hasQuery(searchedRequest)) return "newest first";
  if (!hasPositivePart(searchedRequest)) return "least similar to the excluded content first";
  return hits.some((hit) => hit.matched.length) ? "best match first" : "most similar first";
}

// ---- URL ------------------------------------------------------------------------------------------------------------

function updateUrl() {
  const parameters = new URLSearchParams();
  for (const [name, id] of Object.entries(FIELDS)) if (getValue(id)) parameters.set(name, getValue(id));
  if (query.like.length) parameters.set("like", query.like.join(","));
  if (query.negativeLike.length) parameters.set("unlike", query.negativeLike.join(","));
  const hash = String(parameters) && `#${parameters}`;
  if (hash !== location.hash) history.pushState(null, "", hash || location.pathname);
}

function restoreQuery() {
  const parameters = new URLSearchParams(location.hash.slice(1));
  for (const [name, id] of Object.entries(FIELDS)) $(id).value = parameters.get(name) || "";
  const ids = (name) => (parameters.get(name) || "").split(",").filter(Boolean).slice(0, MAX_IMAGES);
  Object.assign(query, { images: [], like: ids("like"), negativeLike: ids("unlike") });
  showProblem("");
  resizeText();
  search(false);
}

// ---- results --------------------------------------------------------------------------------------------------------

function showHits(newHits) {
  if ($("detail").open) $("detail").close(); // the dialog still shows a hit of the previous search
  hits = newHits;
  anchor = -1;
  for (const id of ["start", "show-more", "show-weak", "save"]) $(id).hidden = true;
  tiles = hits.map(makeTile);
  columns = countColumns();
  addToGrid(0);
  tabStop = null;
  if (hits.length) setTabStop(tiles[0]);
}

function formatDate(hit) {
  return new Date(hit.images[0].taken * 1000).toLocaleDateString();
}

function formatScoreOrDate(hit) {
  return hit.score === null ? formatDate(hit) : hit.score.toFixed(3);
}

// The layout of thousands of elements in one grid takes too long, so the tiles are in blocks of complete rows.

// Thumbnails are loaded when their block comes near the window. The browser's own lazy loading would check the position
// of each of thousands of images for every frame.
const blockObserver = new IntersectionObserver((entries) => {
  for (const { isIntersecting, target } of entries) {
    if (!isIntersecting) continue;
    for (const image of target.querySelectorAll("img[data-source]")) {
      image.src = image.dataset.source;
      image.removeAttribute("data-source");
    }
  }
}, { rootMargin: "1000px" });

function countColumns() {
  return getComputedStyle($("grid")).gridTemplateColumns.split(" ").length;
}

function addToGrid(first) {
  const size = columns * ROWS;
  if (first === 0) {
    blockObserver.disconnect();
    $("grid").replaceChildren();
  }
  for (let index = first; index < tiles.length; index++) {
    if (index % size === 0) {
      const block = document.createElement("div");
      block.className = "rows";
      block.setAttribute("role", "presentation");
      $("grid").append(block);
      blockObserver.observe(block);
    }
    $("grid").lastElementChild.append(tiles[index]);
  }
  if (!tiles.length) return;
  const height = tiles[0].offsetHeight, gap = parseFloat(getComputedStyle($("grid")).rowGap);
  for (let block = Math.floor(first / size); block < $("grid").children.length; block++) {
    const rows = Math.ceil($("grid").children[block].children.length / columns);
    const estimate = rows * (height + gap) - gap; // height of the block until it is rendered for the first time
    $("grid").children[block].style.setProperty("contain-intrinsic-block-size", `auto ${estimate}px`);
  }
}

new ResizeObserver(() => {
  if (countColumns() === columns) return;
  const focused = $("grid").contains(document.activeElement) ? document.activeElement : null;
  columns = countColumns();
  addToGrid(0);
  focused?.focus();
}).observe($("grid"));

function makeTile(hit, index) {
  const tile = document.createElement("div"), button = document.createElement("button");
  const image = document.createElement("img"), line = document.createElement("span");
  const name = document.createElement("span"), score = document.createElement("span");
  const first = hit.images[0];
  image.dataset.source = `/thumbnail/${hit.id}`; // see blockObserver
  image.draggable = false; // dragging selects images
  image.alt = first.captions[0] || first.name;
  name.className = "name";
  name.textContent = first.file_name;
  score.className = "score";
  score.textContent = formatScoreOrDate(hit);
  score.title = hit.score === null ? "" : "Similarity to the query, at most 1";
  line.append(name, score);
  button.append(image, line);
  const notes = describeSimilar(hit);
  if (hit.matched.length) notes.push(describeMatch(hit));
  if (notes.length) {
    const note = document.createElement("span");
    note.className = "note";
    note.textContent = notes.join(" · ");
    button.append(note);
  }
  button.type = "button";
  button.tabIndex = -1;
  button.addEventListener("click", (event) => {
    if (event.shiftKey || event.ctrlKey || event.metaKey) toggleSelected(index, event.shiftKey);
    else showDetail(index);
  });
  tile.className = "tile";
  tile.setAttribute("role", "listitem");
  tile.append(button, makeCheckbox(hit, index));
  tile.classList.toggle("selected", selected.has(hit.id));
  return tile;
}

function setTabStop(tile) {
  if (tabStop) tabStop.tabIndex = -1;
  tabStop = tile.querySelector("button");
  tabStop.tabIndex = 0;
}

function getTileIndex(element) {
  return tiles.indexOf(element.closest(".tile"));
}

function describeSimilar(hit) {
  return hit.similar.length ? [`+${hit.similar.length} similar`] : [];
}

function describeMatch(hit) {
  const names = { caption: "caption", text: "text in image", name: "file name", camera: "camera", date: "date" };
  return `words in ${hit.matched.map((field) => names[field]).join(", ")}`;
}

function showDetail(index) {
  if (index < 0 || index >= hits.length) return;
  openIndex = index;
  hideHeatmap();
  hideExplanation();
  const hit = hits[index], first = hit.images[0];
  $("large").src = `/image/${hit.id}`;
  $("large").onerror = () => { $("large").onerror = null; $("large").src = `/thumbnail/${hit.id}`; };
  $("large").alt = first.captions[0] || first.name;
  const score = hit.score === null ? [] : [`similarity ${hit.score.toFixed(3)}`];
  if (hit.relevance !== null) score.push(`${Math.round(100 * hit.relevance)}% likely to match`);
  const matched = hit.matched.length ? [describeMatch(hit)] : [];
  const facts = [...score, ...hit.details.map(makeDetail), ...matched];
  showFacts(facts);
  $("text-in-image").textContent = hit.text && `Text in the image: ${hit.text}`;
  $("text-in-image").hidden = !hit.text;
  $("original").href = $("download").href = `/image/${hit.id}`;
  $("download").download = getDownloadName(first);
  $("locations").replaceChildren(...hit.images.map(makeLocation));
  if (hit.image_count > hit.images.length) {
    const entry = document.createElement("li");
    entry.textContent = `and ${(hit.image_count - hit.images.length).toLocaleString()} more`;
    $("locations").append(entry);
  }
  $("similar-title").textContent = describeSimilar(hit).join("");
  $("similar").replaceChildren(...hit.similar.map(makeSimilarLink));
  $("back").disabled = index === 0;
  $("next").disabled = index === hits.length - 1;
  $("where").disabled = !hasQuery(searchedRequest);
  $("why").disabled = !searchedRequest.texts.length;
  showOpenSelection();
  if (!$("detail").open) $("detail").showModal();
}

function getDownloadName({ file_name: name }) {
  return /\]\.[^/]*$/.test(name) ? "" : name; // images in tables have no file name
}

function makeSimilarLink({ id, name, file_name: fileName }) {
  const item = document.createElement("li"), link = document.createElement("a"), image = document.createElement("img");
  link.href = `/image/${id}`;
  link.target = "_blank";
  link.rel = "noopener";
  link.title = name;
  image.src = `/thumbnail/${id}`;
  image.alt = `Open ${fileName}`;
  link.append(image);
  item.append(link);
  return item;
}

function makeLocation(image) {
  const entry = document.createElement("li"), path = document.createElement("span"), copy = document.createElement("button");
  path.textContent = image.name;
  copy.type = "button";
  copy.textContent = "Copy path";
  copy.addEventListener("click", () => copyText(image.name, copy));
  entry.append(path, copy);
  for (const caption of image.captions) {
    const line = document.createElement("small");
    line.textContent = caption;
    entry.append(line);
  }
  return entry;
}

async function copyText(text, button) {
  try {
    await navigator.clipboard.writeText(text);
  } catch { // browsers provide the clipboard only over HTTPS and on localhost
    const area = document.createElement("textarea");
    area.value = text;
    button.after(area); // inside the dialog, because elements outside the dialog cannot be selected
    area.select();
    document.execCommand("copy");
    area.remove();
    button.focus();
  }
  button.textContent = "Copied";
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
  if ($("where").disabled) return;
  if ($("where").getAttribute("aria-pressed") === "true") {
    hideHeatmap();
    return;
  }
  const hit = hits[openIndex];
  $("where").setAttribute("aria-pressed", "true");
  showHeatmapStatus("Computing the heat map…");
  const isCurrent = () => hits[openIndex] === hit && $("where").getAttribute("aria-pressed") === "true";
  try {
    const answer = await postJson("/heatmap", { id: hit.id, ...getQueryFields(searchedRequest) });
    if (!isCurrent()) return;
    drawHeatmap(answer.rows, hit);
  } catch (error) {
    if (!isCurrent()) return;
    hideHeatmap();
    showHeatmapStatus(error.message, true);
  }
}

function drawHeatmap(rows, hit) {
  const values = rows.flat(), least = Math.min(...values), most = Math.max(...values);
  const cells = document.createElement("canvas"), context = cells.getContext("2d");
  cells.width = rows[0].length;
  cells.height = rows.length;
  const pixels = context.createImageData(cells.width, cells.height); // black, with an opacity for each cell
  values.forEach((value, i) => { pixels.data[4 * i + 3] = 255 * DARKEST * (most > least ? (most - value) / (most - least) : 0); });
  context.putImageData(pixels, 0, 0);
  const canvas = $("heatmap"), scale = MAX_SIDE / Math.max(hit.width, hit.height); // same aspect ratio as the image
  canvas.width = Math.max(1, Math.round(hit.width * scale));
  canvas.height = Math.max(1, Math.round(hit.height * scale));
  canvas.getContext("2d").drawImage(cells, 0, 0, canvas.width, canvas.height);
  canvas.hidden = false;
  showHeatmapStatus(`Bright: most similar to the query (${most.toFixed(3)}). Dark: least similar (${least.toFixed(3)}).`);
}

// ---- effects of words ------------------------------------------------------------------------------------------------

function hideExplanation() {
  $("why").setAttribute("aria-pressed", "false");
  $("explanation-status").textContent = "";
  $("explanation-status").classList.remove("error");
  $("explanation").replaceChildren();
}

async function toggleExplanation() {
  if ($("why").disabled) return;
  if ($("why").getAttribute("aria-pressed") === "true") {
    hideExplanation();
    return;
  }
  const hit = hits[openIndex], texts = searchedRequest.texts;
  $("why").setAttribute("aria-pressed", "true");
  $("explanation-status").textContent = "Leaving out one word at a time…";
  const isCurrent = () => hits[openIndex] === hit && $("why").getAttribute("aria-pressed") === "true";
  try {
    const answer = await postJson("/explain", { id: hit.id, ...getQueryFields(searchedRequest) });
    if (isCurrent()) showExplanation(texts, answer);
  } catch (error) {
    if (!isCurrent()) return;
    hideExplanation();
    $("explanation-status").textContent = error.message;
    $("explanation-status").classList.add("error");
  }
}

function showExplanation(texts, { score, words }) {
  const largest = Math.max(...words.map((word) => Math.abs(word.effect)));
  $("explanation").replaceChildren(...texts.map((text, textIndex) => {
    const line = document.createElement("p"), characters = [...text]; // positions are counted in code points
    let position = 0;
    for (const word of words.filter((word) => word.text_index === textIndex)) {
      line.append(characters.slice(position, word.start).join(""), makeWord(word, largest));
      position = word.end;
    }
    line.append(characters.slice(position).join(""));
    return line;
  }));
  $("explanation-status").textContent = `The similarity is ${score.toFixed(3)}. Blue words raise it, red words lower it.`;
}

function makeWord({ text, effect }, largest) {
  const word = document.createElement("ruby"), number = document.createElement("rt");
  word.textContent = text;
  word.className = effect < 0 ? "lower" : "raise";
  word.style.setProperty("--share", `${largest ? Math.round(100 * Math.abs(effect) / largest) : 0}%`);
  number.textContent = `${effect < 0 ? "−" : "+"}${Math.abs(effect).toFixed(3)}`;
  word.append(number);
  return word;
}

// ---- more and less like a hit ---------------------------------------------------------------------------------------

// The functions below return true if the search has started.

function searchMoreLike(likedHits) {
  Object.assign(query, { images: [], like: likedHits.map((hit) => hit.id), negativeLike: [] });
  $("text").value = "";
  $("negative").value = "";
  updateQuery();
  return true;
}

function searchLessLike(dislikedHits) {
  const ids = new Set([...query.negativeLike, ...dislikedHits.map((hit) => hit.id)]);
  if (ids.size > MAX_IMAGES) {
    if ($("detail").open) $("detail").close();
    showProblem(`A query can contain at most ${MAX_IMAGES} images that results should not resemble.`);
    return false;
  }
  query.negativeLike = [...ids];
  updateQuery();
  return true;
}

function updateQuery() {
  if ($("detail").open) $("detail").close();
  showProblem("");
  resizeText();
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
  // The model does not need more than MAX_SIDE pixels per side. Files that the browser cannot decode are sent unchanged,
  // because the server may support their format. The server ignores the media type in the URI.
  try {
    const bitmap = await createImageBitmap(file);
    const scale = Math.min(1, MAX_SIDE / Math.max(bitmap.width, bitmap.height));
    if (scale === 1 && ["image/jpeg", "image/png"].includes(file.type)) return toDataUri(file);
    const canvas = document.createElement("canvas");
    canvas.width = Math.max(1, Math.round(bitmap.width * scale));
    canvas.height = Math.max(1, Math.round(bitmap.height * scale));
    const context = canvas.getContext("2d");
    context.fillStyle = "#fff"; // transparent pixels become white, as in the index
    context.fillRect(0, 0, canvas.width, canvas.height);
    context.drawImage(bitmap, 0, 0, canvas.width, canvas.height);
    return canvas.toDataURL("image/jpeg", 0.92);
  } catch {
    if (file.size > MAX_UPLOAD) {
      throw new Error(`the browser cannot decode this file, and it is larger than ${MAX_UPLOAD >> 20} MB`);
    }
    return (await toDataUri(file)).replace(/^data:[^,]*,/, "data:image/unknown;base64,");
  }
}

async function addImages(files) {
  const problems = [], images = [];
  for (const file of files) {
    try {
      // Browsers do not know all image media types, so the type may be empty, for example for .heic files.
      if (file.type && !file.type.startsWith("image/")) throw new Error("this file is not an image");
      images.push({ uri: await toSmallDataUri(file), name: file.name });
    } catch (error) {
      problems.push(describeRejection(file.name, error));
    }
  }
  query.images.push(...images);
  query.images.splice(0, query.images.length - MAX_IMAGES);
  if (images.length) updateQuery();
  showProblem(problems.join("\n"));
}

function describeRejection(name, error) {
  return `${name} was not added to the query: ${error.message}`;
}

function removeRejectedImage(error) {
  // Remove the image that the server could not decode. Return false if the error does not refer to an image.
  const match = /^images\.(\d+)$/.exec(error.param || "");
  if (!match) return false;
  const [image] = query.images.splice(Number(match[1]), 1);
  showProblem(`${$("problem").textContent}\n${describeRejection(image.name, error)}`.trim());
  return true;
}

function showProblem(text) {
  $("problem").textContent = text;
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
    search();
  });
  return chip;
}

function makeFilterChip(id) {
  const chip = document.createElement("button");
  chip.type = "button";
  chip.title = "Remove this filter";
  chip.textContent = `${FILTER_LABELS[id]} ${getValue(id)} ✕`;
  chip.addEventListener("click", () => { $(id).value = ""; search(); });
  return chip;
}

function showChips() {
  $("chips").replaceChildren(
    ...query.like.map((id) => makeChip(`/thumbnail/${id}`, query.like, id, false)),
    ...query.images.map((image) => makeChip(image.uri, query.images, image, false)),
    ...query.negativeLike.map((id) => makeChip(`/thumbnail/${id}`, query.negativeLike, id, true)),
  );
  $("active").replaceChildren(...Object.keys(FILTER_LABELS).filter(getValue).map(makeFilterChip));
  $("uploads").hidden = !query.images.length;
}

// ---- keyboard and mouse ---------------------------------------------------------------------------------------------

function submitQuery() {
  showProblem("");
  search();
  if (!$("start").hidden) showStatus("Enter a description, add an image or set a filter.");
}

$("form").addEventListener("submit", (event) => { event.preventDefault(); submitQuery(); });
$("filters").addEventListener("change", showChips);
$("show-more").addEventListener("click", () => showMore(true));
$("show-weak").addEventListener("click", () => runSearch({ ...searchedRequest, show_weak: true }));
$("text").addEventListener("input", resizeText);
$("text").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); submitQuery(); }
  if (event.key === "ArrowDown" && hits.length && !$("text").value.includes("\n")) { event.preventDefault(); focusHit(0); }
});
$("add").addEventListener("click", () => $("file").click());
$("file").addEventListener("change", () => { addImages([...$("file").files]); $("file").value = ""; });
$("more").addEventListener("click", () => {
  $("filters").hidden = !$("filters").hidden;
  $("more").setAttribute("aria-expanded", String(!$("filters").hidden));
});
$("like").addEventListener("click", () => searchMoreLike([hits[openIndex]]));
$("unlike").addEventListener("click", () => searchLessLike([hits[openIndex]]));
$("where").addEventListener("click", toggleHeatmap);
$("why").addEventListener("click", toggleExplanation);
$("back").addEventListener("click", () => showDetail(openIndex - 1));
$("next").addEventListener("click", () => showDetail(openIndex + 1));
$("close").addEventListener("click", () => $("detail").close());
$("detail").addEventListener("close", () => {
  // This event fires shortly after the dialog closes. If the search box has focus by then, do not move the focus.
  const active = document.activeElement;
  if (hits[openIndex] && (active === document.body || $("grid").contains(active))) focusHit(openIndex);
});
$("detail").addEventListener("click", (event) => { if (event.target === $("detail")) $("detail").close(); });

let swipe = null; // position at which a single finger touched the image
$("picture").addEventListener("touchstart", (event) => {
  const [touch] = event.touches, isZoomed = visualViewport.scale > 1.01;
  swipe = event.touches.length === 1 && !isZoomed ? { x: touch.clientX, y: touch.clientY } : null;
}, { passive: true });
$("picture").addEventListener("touchend", (event) => {
  if (!swipe) return;
  const [touch] = event.changedTouches, right = touch.clientX - swipe.x, down = touch.clientY - swipe.y;
  if (Math.abs(right) > Math.max(MIN_SWIPE, 2 * Math.abs(down))) showDetail(openIndex - Math.sign(right));
  swipe = null;
});

$("grid").addEventListener("focusin", (event) => setTabStop(event.target.closest(".tile")));

function focusHit(index) {
  tiles[Math.max(0, Math.min(index, hits.length - 1))]?.querySelector("button").focus();
}

document.addEventListener("keydown", (event) => {
  const isTyping = event.target.matches("input:not([type=checkbox]), textarea, select");
  if (event.ctrlKey || event.metaKey || event.altKey || isTyping) return;
  if ($("detail").open) {
    if (event.key === "ArrowLeft") showDetail(openIndex - 1);
    if (event.key === "ArrowRight") showDetail(openIndex + 1);
    if (event.key === "m") searchMoreLike([hits[openIndex]]);
    if (event.key === "w") toggleHeatmap();
    if (event.key === "y") toggleExplanation();
    if (event.key === "x") toggleSelected(openIndex);
    return;
  }
  if (event.key === "/") { event.preventDefault(); $("text").focus(); return; }
  if (event.key === "Escape") { clearSelection(); return; }
  const current = getTileIndex(event.target);
  if (current < 0) return;
  const step = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -columns, ArrowDown: columns }[event.key];
  if (event.key === "m") searchMoreLike([hits[current]]);
  if (["x", "X", " "].includes(event.key)) {
    event.preventDefault();
    toggleSelected(current, event.shiftKey);
  }
  if (step) {
    event.preventDefault();
    if (current + step < 0) { $("text").focus(); return; }
    focusHit(current + step);
    if (event.shiftKey) extendSelection(current, Math.min(current + step, hits.length - 1));
  }
});
document.addEventListener("keyup", (event) => {
  if (event.key === " " && getTileIndex(event.target) >= 0) event.preventDefault(); // Firefox clicks buttons here
});

let dragDepth = 0; // nesting depth, because dragenter and dragleave fire for every element under the pointer
addEventListener("dragenter", (event) => {
  if ([...event.dataTransfer.types].includes("Files")) { dragDepth++; $("drop").hidden = false; }
});
addEventListener("dragleave", () => { if (--dragDepth <= 0) { dragDepth = 0; $("drop").hidden = true; } });
addEventListener("dragover", (event) => event.preventDefault());
addEventListener("drop", (event) => {
  event.preventDefault();
  dragDepth = 0;
  $("drop").hidden = true;
  if (event.dataTransfer.files.length) addImages([...event.dataTransfer.files]);
});
addEventListener("paste", (event) => {
  if (event.clipboardData.files.length) { event.preventDefault(); addImages([...event.clipboardData.files]); }
});

addEventListener("popstate", restoreQuery);
addEventListener("DOMContentLoaded", () => { watchEnd(); restoreQuery(); });
