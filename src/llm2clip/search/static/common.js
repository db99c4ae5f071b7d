"use strict";
// Functions of the search page and of galleries.

const $ = (id) => document.getElementById(id);

function showStatus(text, isError = false) {
  $("status").textContent = text;
  $("status").classList.toggle("error", isError);
}

function resizeText() {
  $("text").style.height = "auto";
  $("text").style.height = `${$("text").scrollHeight}px`;
}

function showFacts(facts) {
  // Facts are texts and links.
  $("facts").replaceChildren(...facts.flatMap((fact, index) => (index ? [" · ", fact] : [fact])));
}

function makeDetail({ text, url }) {
  if (!url) return text;
  const link = document.createElement("a");
  link.href = url;
  link.target = "_blank";
  link.rel = "noopener noreferrer";
  link.textContent = text;
  return link;
}
