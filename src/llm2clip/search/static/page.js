"use strict";
// The page of the search: one query at a time, its answer in a grid. It talks to /search, /thumbnail and /picture of
// the server that it came from, and to nobody else.

const $ = (id) => document.getElementById(id);
const LARGEST = 1024; // pixels of a side, to which a picture is made smaller before it is sent
const query = { images: [], like: [], withoutImages: [] }; // images: data URIs; like: ids of hits
let hits = [], open = -1, asked = 0;

// ---- asking ---------------------------------------------------------------------------------------------------------

function day(input, end) {
  return input.value ? new Date(input.value + (end ? "T23:59:59" : "T00:00:00")).getTime() / 1000 : null;
}

function request() {
  const text = $("text").value.trim(), without = $("without").value.trim();
  return {
    texts: text ? [text] : [],
    images: query.images,
    like: query.like,
    without_texts: without ? [without] : [],
    without_images: query.withoutImages,
    only: {
      caption: $("caption").value.trim() || null,
      under: $("under").value.trim() || null,
      after: day($("after"), false),
      before: day($("before"), true),
    },
  };
}

async function search(remember = true) {
  const body = request(), mine = ++asked;
  if (!body.texts.length && !body.images.length && !body.like.length) {
    show([]);
    say("");
    $("empty").hidden = false;
    document.body.classList.remove("searching");
    return;
  }
  if (remember) {
    const hash = "#" + new URLSearchParams({ q: $("text").value.trim(), like: query.like.join(",") });
    if (hash !== location.hash) history.pushState(null, "", hash);
  }
  const start = performance.now();
  document.body.classList.add("searching");
  say("Searching…");
  try {
    const response = await fetch("/search", {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify(body),
    });
    const answer = await response.json();
    if (mine !== asked) return; // another query came after this one
    if (!response.ok) throw new Error(answer.error.message);
    show(answer.hits);
    const seconds = ((performance.now() - start) / 1000).toFixed(2);
    say(hits.length ? `${hits.length} pictures, the closest first (${seconds} s)` : "Nothing found. Filters may be too narrow.");
  } catch (error) {
    if (mine !== asked) return;
    show([]);
    say(error instanceof TypeError ? "The server does not answer. Is it still running?" : error.message, true);
  } finally {
    if (mine === asked) document.body.classList.remove("searching");
  }
}

function say(text, bad = false) {
  $("status").textContent = text;
  $("status").classList.toggle("bad", bad);
}

// ---- what was found -------------------------------------------------------------------------------------------------

function show(found) {
  if ($("detail").open) $("detail").close(); // it shows one of the hits that go now
  hits = found;
  $("empty").hidden = true;
  $("grid").replaceChildren(...found.map((hit, n) => {
    const item = document.createElement("li"), button = document.createElement("button");
    const image = document.createElement("img"), line = document.createElement("span");
    const name = document.createElement("span"), score = document.createElement("span");
    image.src = `/thumbnail/${hit.id}`;
    image.loading = "lazy";
    image.alt = hit.pictures[0].captions[0] || hit.pictures[0].name;
    name.className = "name";
    name.textContent = hit.pictures[0].name.split(/[/!]/).pop();
    score.className = "score";
    score.textContent = hit.score.toFixed(3);
    line.append(name, score);
    button.append(image, line);
    button.type = "button";
    button.addEventListener("click", () => detail(n));
    item.append(button);
    return item;
  }));
}

function detail(n) {
  if (n < 0 || n >= hits.length) return;
  open = n;
  const hit = hits[n], first = hit.pictures[0];
  $("large").src = `/picture/${hit.id}`;
  $("large").onerror = () => { $("large").onerror = null; $("large").src = `/thumbnail/${hit.id}`; };
  $("large").alt = first.captions[0] || first.name;
  $("facts").textContent = `${hit.score.toFixed(3)} · ${hit.width} × ${hit.height} · ` +
    new Date(first.taken * 1000).toLocaleDateString();
  $("places").replaceChildren(...hit.pictures.map((picture) => {
    const place = document.createElement("li");
    place.textContent = picture.name;
    for (const caption of picture.captions) {
      const line = document.createElement("small");
      line.textContent = caption;
      place.append(line);
    }
    return place;
  }));
  $("back").disabled = n === 0;
  $("next").disabled = n === hits.length - 1;
  if (!$("detail").open) $("detail").showModal();
}

function moreLike(hit) {
  Object.assign(query, { images: [], like: [hit.id], withoutImages: [] });
  $("text").value = "";
  $("without").value = "";
  settle();
}

async function without(hit) {
  const response = await fetch(`/thumbnail/${hit.id}`);
  if (!response.ok || query.withoutImages.length >= 16) return;
  query.withoutImages.push(await uri(await response.blob()));
  settle();
}

function settle() {
  if ($("detail").open) $("detail").close();
  grow();
  chips();
  scrollTo(0, 0);
  search();
}

// ---- pictures in the query ------------------------------------------------------------------------------------------

function uri(blob) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(blob);
  });
}

async function smaller(file) {
  // A photograph of 20 MB says no more than one of 1,024 pixels; what the browser cannot decode the server may.
  try {
    const bitmap = await createImageBitmap(file);
    const scale = Math.min(1, LARGEST / Math.max(bitmap.width, bitmap.height));
    if (scale === 1) return uri(file);
    const canvas = document.createElement("canvas");
    canvas.width = Math.max(1, Math.round(bitmap.width * scale));
    canvas.height = Math.max(1, Math.round(bitmap.height * scale));
    const pen = canvas.getContext("2d");
    pen.fillStyle = "#fff"; // what is transparent lies over white, as in the index
    pen.fillRect(0, 0, canvas.width, canvas.height);
    pen.drawImage(bitmap, 0, 0, canvas.width, canvas.height);
    return canvas.toDataURL("image/jpeg", 0.92);
  } catch {
    return uri(file);
  }
}

async function add(files) {
  const pictures = [...files].filter((file) => file.type.startsWith("image/"));
  if (!pictures.length) {
    say("That is no picture.", true);
    return;
  }
  query.images.push(...await Promise.all(pictures.map(smaller)));
  query.images.splice(0, query.images.length - 16);
  settle();
}

function chips() {
  const make = (source, list, entry, kind) => {
    const chip = document.createElement("button"), image = document.createElement("img");
    chip.type = "button";
    chip.className = `chip ${kind}`;
    chip.title = "Take this picture out of the query";
    image.src = source;
    image.alt = `${kind || "like"} this picture`;
    chip.append(image);
    chip.addEventListener("click", () => {
      list.splice(list.indexOf(entry), 1);
      chips();
      search();
    });
    return chip;
  };
  $("chips").replaceChildren(
    ...query.like.map((id) => make(`/thumbnail/${id}`, query.like, id, "")),
    ...query.images.map((source) => make(source, query.images, source, "")),
    ...query.withoutImages.map((source) => make(source, query.withoutImages, source, "without")),
  );
}

// ---- hands ----------------------------------------------------------------------------------------------------------

function grow() {
  $("text").style.height = "auto";
  $("text").style.height = `${$("text").scrollHeight}px`;
}

$("form").addEventListener("submit", (event) => { event.preventDefault(); search(); });
$("text").addEventListener("input", grow);
$("text").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); search(); }
  if (event.key === "ArrowDown" && hits.length && !$("text").value.includes("\n")) { event.preventDefault(); focus(0); }
});
$("add").addEventListener("click", () => $("file").click());
$("file").addEventListener("change", () => { add($("file").files); $("file").value = ""; });
$("more").addEventListener("click", () => {
  $("filters").hidden = !$("filters").hidden;
  $("more").setAttribute("aria-expanded", String(!$("filters").hidden));
});
$("like").addEventListener("click", () => moreLike(hits[open]));
$("unlike").addEventListener("click", () => without(hits[open]));
$("back").addEventListener("click", () => detail(open - 1));
$("next").addEventListener("click", () => detail(open + 1));
$("close").addEventListener("click", () => $("detail").close());
$("detail").addEventListener("close", () => {
  // The event comes a moment after the closing: whoever has gone on to the search box by then stays there.
  if (hits[open] && [document.body, ...$("grid").querySelectorAll("button")].includes(document.activeElement)) focus(open);
});
$("detail").addEventListener("click", (event) => { if (event.target === $("detail")) $("detail").close(); });

function focus(n) {
  const buttons = $("grid").querySelectorAll("button");
  if (buttons.length) buttons[Math.max(0, Math.min(n, buttons.length - 1))].focus();
}

document.addEventListener("keydown", (event) => {
  const typing = event.target.matches("input, textarea");
  if (event.ctrlKey || event.metaKey || event.altKey || typing) return;
  if ($("detail").open) {
    if (event.key === "ArrowLeft") detail(open - 1);
    if (event.key === "ArrowRight") detail(open + 1);
    if (event.key === "m") moreLike(hits[open]);
    return;
  }
  if (event.key === "/") { event.preventDefault(); $("text").focus(); return; }
  const buttons = [...$("grid").querySelectorAll("button")], at = buttons.indexOf(document.activeElement);
  if (at < 0) return;
  const columns = buttons.filter((b) => b.offsetTop === buttons[0].offsetTop).length;
  const step = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -columns, ArrowDown: columns }[event.key];
  if (event.key === "m") moreLike(hits[at]);
  if (step) {
    event.preventDefault();
    if (at + step < 0) $("text").focus();
    else focus(at + step);
  }
});

let depth = 0; // dragenter and dragleave come for every element on the way
addEventListener("dragenter", (event) => {
  if ([...event.dataTransfer.types].includes("Files")) { depth++; $("drop").hidden = false; }
});
addEventListener("dragleave", () => { if (--depth <= 0) { depth = 0; $("drop").hidden = true; } });
addEventListener("dragover", (event) => event.preventDefault());
addEventListener("drop", (event) => {
  event.preventDefault();
  depth = 0;
  $("drop").hidden = true;
  if (event.dataTransfer.files.length) add(event.dataTransfer.files);
});
addEventListener("paste", (event) => {
  if (event.clipboardData.files.length) { event.preventDefault(); add(event.clipboardData.files); }
});

function fromHash() {
  const asked = new URLSearchParams(location.hash.slice(1));
  $("text").value = asked.get("q") || "";
  Object.assign(query, { images: [], withoutImages: [] });
  query.like = (asked.get("like") || "").split(",").filter(Boolean);
  grow();
  chips();
  search(false);
}
addEventListener("popstate", fromHash);
fromHash();
