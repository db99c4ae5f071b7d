"use strict";
// Selection of results with checkboxes, keys or a rubber band, and the bar with actions for the selected images.

const MAX_DOWNLOADS = 10; // browsers drop more downloads that start at the same time
const MIN_DRAG = 8; // in CSS pixels; shorter movements are clicks
const SCROLL_MARGIN = 32; // in CSS pixels; closer to the edge of the window, dragging scrolls the page
const selected = new Map(); // hit id -> hit, in the order of selection; kept when the user searches again
let anchor = -1; // index of the result from which Shift extends the selection

// ---- selection ------------------------------------------------------------------------------------------------------

function makeCheckbox(hit, index) {
  const label = document.createElement("label"), checkbox = document.createElement("input");
  label.className = "mark";
  checkbox.type = "checkbox";
  checkbox.tabIndex = -1; // x and the space key select the focused image
  checkbox.checked = selected.has(hit.id);
  checkbox.setAttribute("aria-label", `Select ${hit.images[0].file_name}`);
  checkbox.addEventListener("click", (event) => toggleSelected(index, event.shiftKey));
  label.append(checkbox);
  return label;
}

function setSelected(index, isSelected) {
  const hit = hits[index], tile = tiles[index];
  if (isSelected) selected.set(hit.id, hit);
  else selected.delete(hit.id);
  tile.classList.toggle("selected", isSelected);
  tile.querySelector("input").checked = isSelected;
}

function toggleSelected(index, extend = false) {
  if (extend && anchor >= 0 && anchor < hits.length) {
    extendSelection(anchor, index);
    return;
  }
  anchor = index;
  setSelected(index, !selected.has(hits[index].id));
  showSelection();
}

function extendSelection(from, to) {
  if (anchor < 0 || anchor >= hits.length) anchor = from;
  for (let index = Math.min(from, to); index <= Math.max(from, to); index++) setSelected(index, true);
  showSelection();
}

function clearSelection() {
  for (const tile of $("grid").querySelectorAll(".selected")) {
    tile.classList.remove("selected");
    tile.querySelector("input").checked = false;
  }
  selected.clear();
  anchor = -1;
  showSelection();
}

function showSelection() {
  const count = selected.size;
  $("selection").hidden = count === 0;
  document.body.classList.toggle("selecting", count > 0);
  $("selection-count").textContent = count === 1 ? "1 image selected" : `${count} images selected`;
  const limits = { "selection-like": MAX_IMAGES, "selection-unlike": MAX_IMAGES, "selection-download": MAX_DOWNLOADS };
  for (const [id, limit] of Object.entries(limits)) {
    $(id).disabled = count > limit;
    $(id).title = count > limit ? `For at most ${limit} images` : "";
  }
  showOpenSelection();
}

function showOpenSelection() {
  // The button in the detail view shows whether the open image is selected.
  const isSelected = openIndex >= 0 && openIndex < hits.length && selected.has(hits[openIndex].id);
  $("select").setAttribute("aria-pressed", String(isSelected));
}

// ---- actions --------------------------------------------------------------------------------------------------------

function searchLikeSelection(searchLike) {
  if (searchLike([...selected.values()])) clearSelection();
}

function makeCsv(selectedHits) {
  // Spreadsheets run cells that begin with these characters as formulas, so an apostrophe is put in front of them.
  const quoteText = (text) => `"${text.replace(/^(?=[=+\-@\t\r])/, "'").replaceAll('"', '""')}"`;
  const quote = (value) => (typeof value === "number" ? String(value) : quoteText(value ?? ""));
  const rows = [];
  for (const hit of selectedHits) {
    const { id, score, relevance, images, image_count, matched, text, details, similar, ...contentMetadata } = hit;
    for (const { name, file_name, captions, ...imageMetadata } of images) {
      rows.push({ id, name, captions: captions.join("\n"), ...imageMetadata, ...contentMetadata });
    }
  }
  const header = Object.keys(rows[0]);
  const table = [header, ...rows.map((row) => Object.values(row))];
  const lines = table.map((row) => row.map(quote).join(",") + "\r\n");
  return `\ufeff${lines.join("")}`; // the byte order mark tells spreadsheets that the file is in UTF-8
}

function exportList() {
  const url = URL.createObjectURL(new Blob([makeCsv(selected.values())], { type: "text/csv" }));
  downloadUrl(url, "images.csv");
  setTimeout(() => URL.revokeObjectURL(url), 60000);
}

function downloadUrl(url, name) {
  const link = document.createElement("a");
  link.href = url;
  link.download = name;
  link.click();
}

$("selection-like").addEventListener("click", () => searchLikeSelection(searchMoreLike));
$("selection-unlike").addEventListener("click", () => searchLikeSelection(searchLessLike));
$("selection-export").addEventListener("click", exportList);
$("selection-download").addEventListener("click", () => {
  for (const hit of selected.values()) downloadUrl(`/image/${hit.id}`, getDownloadName(hit.images[0]));
});
$("selection-clear").addEventListener("click", () => {
  clearSelection();
  tabStop?.focus(); // the focused button is now hidden
});
$("select").addEventListener("click", () => toggleSelected(openIndex));

// ---- rubber band ----------------------------------------------------------------------------------------------------

let drag = null; // position at which the mouse button was pressed, in page coordinates, and the measured tiles if it has moved

function measure(element) {
  const box = element.getBoundingClientRect();
  return { left: box.left + scrollX, right: box.right + scrollX, top: box.top + scrollY, bottom: box.bottom + scrollY };
}

function findTilesInside(band) {
  // Measuring a tile renders its block, so only the blocks that the band touches are measured, and only once.
  const touches = (box) => box.left < band.right && box.right > band.left && box.top < band.bottom && box.bottom > band.top;
  const inside = new Set();
  for (const block of $("grid").children) {
    if (!touches(measure(block))) continue;
    for (const tile of block.children) {
      if (!drag.boxes.has(tile)) drag.boxes.set(tile, measure(tile));
      if (touches(drag.boxes.get(tile))) inside.add(tile);
    }
  }
  return inside;
}

function updateBand(event) {
  const x = event.clientX + scrollX, y = event.clientY + scrollY;
  if (!drag.boxes) {
    if (Math.hypot(x - drag.x, y - drag.y) < MIN_DRAG) return;
    drag.boxes = new Map();
    drag.before = new Set(selected.keys());
    getSelection().removeAllRanges();
    document.body.classList.add("dragging");
    $("band").hidden = false;
  }
  const band = { left: Math.min(x, drag.x), right: Math.max(x, drag.x), top: Math.min(y, drag.y), bottom: Math.max(y, drag.y) };
  const position = { left: band.left - scrollX, top: band.top - scrollY, width: band.right - band.left, height: band.bottom - band.top };
  for (const [name, value] of Object.entries(position)) $("band").style[name] = `${value}px`;
  const inside = findTilesInside(band);
  tiles.forEach((tile, index) => {
    const isSelected = inside.has(tile) || drag.before.has(hits[index].id);
    if (isSelected !== selected.has(hits[index].id)) setSelected(index, isSelected);
  });
  showSelection();
  if (event.clientY < SCROLL_MARGIN) scrollBy(0, -SCROLL_MARGIN);
  if (event.clientY > innerHeight - SCROLL_MARGIN) scrollBy(0, SCROLL_MARGIN);
}

function endDrag() {
  if (drag?.boxes) {
    document.body.classList.remove("dragging");
    $("band").hidden = true;
    // The mouse button was released over a result, which must not open.
    const ignoreClick = (event) => { event.preventDefault(); event.stopPropagation(); };
    addEventListener("click", ignoreClick, { capture: true, once: true });
    setTimeout(() => removeEventListener("click", ignoreClick, { capture: true }));
  }
  drag = null;
}

document.querySelector("main").addEventListener("pointerdown", (event) => {
  const isOnGrid = event.target.matches("main, #grid, #grid *") && !event.target.closest(".mark");
  if (event.pointerType === "mouse" && event.button === 0 && isOnGrid && hits.length) {
    drag = { x: event.clientX + scrollX, y: event.clientY + scrollY, boxes: null, before: null };
  }
});
addEventListener("pointermove", (event) => { if (drag) updateBand(event); });
addEventListener("pointerup", endDrag);
addEventListener("pointercancel", endDrag);
