// What every page does: local times, forms that submit themselves, buttons that change a run, regions that refresh.

import { actions } from "./actions.js";
import { outbox } from "./outbox.js";

export function localTimes(root = document) {
  const parts = { month: "short", day: "numeric", hour: "numeric", minute: "2-digit" };
  const recent = new Intl.DateTimeFormat(undefined, parts);
  const older = new Intl.DateTimeFormat(undefined, { year: "numeric", ...parts });
  const year = new Date().getFullYear();
  for (const element of root.querySelectorAll("time[datetime]:not([data-local])")) {
    const at = new Date(element.dateTime);
    element.textContent = (at.getFullYear() === year ? recent : older).format(at);
    element.title = at.toISOString();
    element.dataset.local = "";
  }
}

// Small images are shown with sharp pixels: blur would hide what is to be judged.
export function sharpen(picture) {
  picture.classList.toggle("sharp", picture.naturalWidth > 0 && picture.naturalWidth * 1.5 < picture.clientWidth);
}

function sharpenAll() {
  for (const picture of document.querySelectorAll("img[data-sharpen]")) {
    if (picture.complete) sharpen(picture);
    else picture.addEventListener("load", () => sharpen(picture), { once: true });
  }
}

function submitOnChange() {
  for (const form of document.querySelectorAll("form[data-auto]")) {
    form.addEventListener("change", () => {
      const needsScorer = ["score_min", "score_max"].some((name) => form.elements[name]?.value);
      if (!needsScorer || form.elements.scorer.value) form.requestSubmit();
      else form.elements.scorer.focus(); // a bound of scores needs the name of a scorer
    });
    form.addEventListener("submit", () => {
      for (const field of form.elements) {
        if (field.name && field.value === "") field.disabled = true; // a short address without empty filters
      }
    });
  }
}

// Replaces every element with `data-live` by that of the same page, read again. Focus and scroll positions stay.
export async function refresh() {
  const response = await fetch(location.href, { headers: { Accept: "text/html" } });
  if (!response.ok || response.redirected) return;
  const fresh = new DOMParser().parseFromString(await response.text(), "text/html");
  for (const old of document.querySelectorAll("[data-live]")) {
    const replacement = fresh.getElementById(old.id);
    if (replacement === null || old.contains(document.activeElement) || old.isEqualNode(replacement)) continue;
    localTimes(replacement);
    keepChecked(old, replacement);
    old.replaceWith(replacement);
  }
}

function keepChecked(old, replacement) {
  const checked = new Set(Array.from(old.querySelectorAll("input:checked"), (box) => box.value));
  for (const box of replacement.querySelectorAll("input[type=checkbox]")) box.checked = checked.has(box.value);
}

// Two runs can be compared; with a script, no third one can be chosen.
function limitComparison() {
  const form = document.getElementById("compare");
  if (form === null) return;
  const update = () => {
    const boxes = Array.from(form.elements).filter((element) => element.type === "checkbox");
    const count = boxes.filter((box) => box.checked).length;
    for (const box of boxes) box.disabled = count >= 2 && !box.checked;
    form.querySelector("button").disabled = count !== 2;
  };
  document.addEventListener("change", (event) => event.target.form === form && update());
  window.addEventListener("pageshow", update);
  update();
}

function refreshRegularly() {
  const region = document.querySelector("[data-refresh]");
  if (region === null) return;
  const seconds = Number(region.dataset.refresh);
  setInterval(() => {
    if (document.visibilityState === "visible" && document.querySelector("[data-refresh]")) refresh().catch(() => {});
  }, 1000 * seconds);
}

// Replaces every element with `data-load` by that of the page at this address, which takes longer than the page itself.
async function loadPanels() {
  for (const element of document.querySelectorAll("[data-load]")) {
    const response = await fetch(element.dataset.load, { headers: { Accept: "text/html" } });
    if (!response.ok || response.redirected) continue; // the link remains
    const page = new DOMParser().parseFromString(await response.text(), "text/html");
    const panel = page.getElementById(element.id);
    if (panel !== null) element.replaceWith(panel);
  }
}

localTimes();
sharpenAll();
submitOnChange();
refreshRegularly();
limitComparison();
loadPanels().catch(() => {});
actions();
outbox.start();
