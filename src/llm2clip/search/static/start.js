"use strict";
// First screen: example queries, the newest images and saved searches. All of them are links to searches.

const SAVED_SEARCHES = "llm2clip-saved-searches"; // key in the browser's local storage
const MAX_CAPTIONS = 64; // number of images whose captions can be example queries
const MAX_QUERIES = 6;
const MAX_NEWEST = 12;
let hasExamples = false; // true once the examples have been requested

function showStart() {
  $("start").hidden = false;
  showSavedSearches();
  if (!hasExamples) showExamples();
}

async function showExamples() {
  hasExamples = true;
  try {
    const { hits: newest } = await postJson("/search", { top: MAX_CAPTIONS }); // without a query, the newest images come first
    const queries = chooseQueries(newest.flatMap((hit) => hit.images[0].captions.slice(0, 1)));
    $("queries").replaceChildren(...queries.map((text) => makeListItem(makeSearchLink({ q: text }, text))));
    $("newest").replaceChildren(...newest.slice(0, MAX_NEWEST).map((hit) => makeListItem(makeImageLink(hit))));
    $("try").hidden = !queries.length;
    $("recent").hidden = !newest.length;
  } catch (error) {
    hasExamples = false;
    if (!$("start").hidden) showStatus(error.message, true);
  }
}

function chooseQueries(captions) {
  // The shortest captions are the best examples.
  const texts = [...new Set(captions.map((caption) => caption.trim().replace(/\s+/g, " ")))];
  const usable = texts.filter((text) => text.length >= 4 && text.length <= 200);
  return usable.sort((a, b) => a.length - b.length).slice(0, MAX_QUERIES);
}

function makeListItem(...children) {
  const item = document.createElement("li");
  item.append(...children);
  return item;
}

function makeSearchLink(parameters, text) {
  const link = document.createElement("a");
  link.href = `#${new URLSearchParams(parameters)}`;
  link.textContent = text;
  return link;
}

function makeImageLink({ id, images: [{ file_name: fileName }] }) {
  const link = makeSearchLink({ like: id }, ""), image = document.createElement("img");
  image.src = `/thumbnail/${id}`;
  image.alt = `Images like ${fileName}`;
  link.append(image);
  return link;
}

// ---- saved searches -------------------------------------------------------------------------------------------------

function readSavedSearches() {
  try {
    return JSON.parse(localStorage.getItem(SAVED_SEARCHES) || "[]");
  } catch (error) {
    showProblem(`Saved searches cannot be read: ${error.message}`);
    return [];
  }
}

function writeSavedSearches(searches) {
  try {
    localStorage.setItem(SAVED_SEARCHES, JSON.stringify(searches));
    return true;
  } catch (error) { // the storage is full, or the browser's settings block it
    showProblem(`The search cannot be saved: ${error.message}`);
    return false;
  }
}

function saveSearch() {
  const filters = Object.keys(FILTER_LABELS).filter(getValue).map((id) => `${FILTER_LABELS[id]} ${getValue(id)}`);
  const marked = query.like.length + query.negativeLike.length;
  if (marked) filters.unshift(marked === 1 ? "1 image" : `${marked} images`);
  const suggestion = [getValue("text"), ...filters].filter(Boolean).join(", ").slice(0, 100);
  const name = prompt("Name of the saved search", suggestion)?.trim();
  if (!name) return;
  const hash = location.hash.slice(1), others = readSavedSearches().filter((saved) => saved.name !== name);
  if (writeSavedSearches([{ name, hash }, ...others])) showStatus(`Saved “${name}”. Saved searches are on the first screen.`);
}

function showSavedSearches() {
  const searches = readSavedSearches();
  $("saved").replaceChildren(...searches.map((saved) => {
    const remove = document.createElement("button");
    remove.type = "button";
    remove.textContent = "✕";
    remove.setAttribute("aria-label", `Delete saved search ${saved.name}`);
    remove.addEventListener("click", () => {
      writeSavedSearches(readSavedSearches().filter((other) => other.name !== saved.name));
      showSavedSearches();
      ($("saved").querySelector("button") || $("text")).focus();
    });
    return makeListItem(makeSearchLink(saved.hash, saved.name), remove);
  }));
  $("saved-searches").hidden = !searches.length;
}

$("save").addEventListener("click", saveSearch);
