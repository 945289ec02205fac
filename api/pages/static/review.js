// The review of pairs: comparing the images, verdicts by keyboard, and the next pair ready before it is needed.

import { send, toast } from "./http.js";
import { outbox } from "./outbox.js";
import { localTimes, sharpen } from "./page.js";
import { Pages } from "./pages.js";

const AHEAD = 3; // pairs that are loaded in advance
const FLICKER_MILLISECONDS = 700;
const reducedMotion = matchMedia("(prefers-reduced-motion: reduce)");

const settings = {
  get(name, fallback) {
    return localStorage.getItem(`dfusion.review.${name}`) ?? fallback;
  },
  set(name, value) {
    localStorage.setItem(`dfusion.review.${name}`, value);
  },
};
const salt = settings.get("salt") ?? crypto.getRandomValues(new Uint32Array(1))[0].toString();
settings.set("salt", salt);

const pages = new Pages("pair", (shown) => {
  article = shown;
  prepare();
});
const given = []; // verdicts of this sitting, for undo
let article = document.getElementById("pair");
let flicker;

const $ = (selector) => article.querySelector(selector);
const $$ = (selector) => article.querySelectorAll(selector);

// ---- The images

function isBlind() {
  return article.dataset.blind === "true";
}

// A reviewer sees a pair always in the same order, and half of the pairs in either order.
function isSwapped(pair) {
  let hash = 2166136261;
  for (const character of salt + pair) hash = Math.imul(hash ^ character.codePointAt(0), 16777619);
  return ((hash >>> 13) ^ (hash >>> 5)) % 2 !== 0;
}

function order() {
  const both = ["base", article.dataset.other];
  return isBlind() && isSwapped(article.dataset.pair) ? both.reverse() : both;
}

function compared() {
  const select = $("#compared");
  return isBlind() || !select ? order() : select.value.split(" ");
}

function arrange() {
  const mode = article.dataset.mode;
  const [left, right] = mode === "side" ? order() : compared();
  for (const side of $$(".side")) {
    const { role } = side.dataset;
    side.dataset.place = role === left ? "left" : role === right ? "right" : "extra";
    side.querySelector(".veil").textContent = role === left ? "A" : role === right ? "B" : "";
    side.querySelector(".picture").alt = isBlind() ? `Image ${role === left ? "A" : "B"}` : `${role} image`;
  }
  for (const button of $$(".tabs [data-mode]")) button.setAttribute("aria-pressed", button.dataset.mode === mode);
  $("#blind-toggle")?.setAttribute("aria-pressed", isBlind());
  $("#mask-toggle")?.setAttribute("aria-pressed", article.dataset.mask);
  $("#cut").hidden = mode !== "slider";

  const [first, second] = order();
  const label = (role, letter) => (isBlind() ? `${letter} is better` : `${role[0].toUpperCase()}${role.slice(1)} is better`);
  const names = $$(".side-name");
  if (names.length === 2) [names[0].textContent, names[1].textContent] = [label(first, "A"), label(second, "B")];
  $$(".picture").forEach(sharpen);
  showFlicker();
}

function showFlicker() {
  clearInterval(flicker);
  article.dataset.flicker = "left";
  if (article.dataset.mode !== "flicker" || reducedMotion.matches) return;
  flicker = setInterval(alternate, FLICKER_MILLISECONDS);
}

function alternate() {
  article.dataset.flicker = article.dataset.flicker === "left" ? "right" : "left";
}

function setMode(mode) {
  if (mode === "flicker" && article.dataset.mode === "flicker") alternate(); // by hand, too
  article.dataset.mode = mode;
  settings.set("mode", mode);
  arrange();
}

function setSize(pixels) {
  const size = $("#size");
  size.value = pixels;
  article.style.setProperty("--size", `${size.value}px`);
  settings.set("size", size.value);
  $$(".picture").forEach(sharpen);
}

function setBlind(isOn) {
  article.dataset.blind = String(isOn && article.dataset.judging === "true");
  if (isBlind()) article.dataset.mask = "false";
  arrange();
}

function toggleMask() {
  if (isBlind() || !$("#mask-toggle")) return;
  article.dataset.mask = String(article.dataset.mask !== "true");
  if (article.dataset.mask === "true" && article.dataset.mode !== "side") setMode("side");
  arrange();
}

// ---- Verdicts

function reviewer() {
  return settings.get("reviewer", "") || null;
}

// Without API keys, pages show the verdicts of the name in this cookie.
function nameReviewer() {
  const name = encodeURIComponent(settings.get("reviewer", ""));
  document.cookie = `dfusion_reviewer=${name}; path=/; max-age=31536000; samesite=strict`;
}

function describe(prefer, state) {
  const note = $("#verdict-note");
  if (!note) return;
  note.replaceChildren();
  if (prefer) {
    const strong = document.createElement("b");
    strong.textContent = prefer;
    note.append("Your verdict: ", strong, state ? ` (${state})` : "");
  } else if (state) note.append(state);
  for (const button of $$(".verdicts button[data-verdict], .verdicts button[data-side]")) {
    const verdict = button.dataset.verdict ?? verdictOf(button.dataset.side);
    button.setAttribute("aria-pressed", verdict === prefer);
  }
}

function verdictOf(place) {
  return order()[place === "left" ? 0 : 1] === "base" ? "base" : "target";
}

function judge(prefer) {
  if (article.dataset.judging !== "true" || pages.isLoading) return;
  const { pair, url, verdict } = article.dataset;
  given.push({ pair, url, before: verdict || null });
  outbox.add(pair, prefer, Number(article.dataset.revision), reviewer());
  article.dataset.verdict = prefer;
  describe(prefer, "");
  if (settings.get("advance", "on") === "on") next("The verdict is noted. ");
  else setBlind(false);
}

function undo() {
  if (pages.isLoading) return;
  const last = given.pop();
  if (last === undefined) return toast("Nothing to undo on this page.");
  outbox.add(last.pair, last.before, 0, reviewer());
  const restore = () => {
    article.dataset.verdict = last.before ?? "";
    describe(last.before, last.before ? "restored" : "The verdict is removed.");
  };
  if (last.pair === article.dataset.pair) return restore();
  pages.show(last.url).then((isShown) => isShown && restore());
}

function next(prefix = "") {
  const url = article.dataset.next;
  if (url) return void pages.show(url);
  setBlind(false);
  toast(`${prefix}This was the last pair of the queue.`);
}

function showConflict() {
  const banner = $("#conflict");
  const conflict = outbox.conflicts[article.dataset.pair];
  banner.hidden = conflict === undefined;
  if (conflict === undefined) return;

  const stored = conflict.stored ? `your verdict “${conflict.stored}” was stored` : "your verdict was removed";
  const text = document.createElement("p");
  text.textContent = `Since you opened this pair here, ${stored} from another page. “${conflict.prefer ?? "none"}” is not stored.`;
  const buttons = document.createElement("p");
  buttons.className = "buttons";
  const button = (label, action) => {
    const element = document.createElement("button");
    element.type = "button";
    element.textContent = label;
    element.addEventListener("click", () => {
      outbox.resolve(article.dataset.pair);
      action();
      showConflict();
    });
    return element;
  };
  buttons.append(
    button(conflict.stored ? `Keep “${conflict.stored}”` : "Keep none", () => {
      article.dataset.verdict = conflict.stored ?? "";
      describe(conflict.stored, "stored");
    }),
    button(`Store “${conflict.prefer ?? "none"}”`, () => {
      outbox.add(article.dataset.pair, conflict.prefer, Number(article.dataset.revision), reviewer());
      describe(conflict.prefer, "");
    }),
  );
  banner.replaceChildren(text, buttons);
}

// ---- Gold pairs: loaded on demand, so that the page of a pair does not say whether it is one

async function loadGold() {
  const response = await send(`/pairs/${article.dataset.pair}/gold`);
  if (!response.ok) return toast("The gold verdict cannot be loaded.", true);
  $("#gold-verdict").value = (await response.json()).expected ?? "";
  $("#gold-verdict").disabled = false;
}

async function storeGold(expected) {
  const body = JSON.stringify({ expected: expected || null });
  const response = await send(`/pairs/${article.dataset.pair}/gold`, { method: "PUT", body });
  if (!response.ok) toast("The gold verdict is not stored.", true);
  else toast(expected ? `Gold pair: “${expected}” is expected.` : "This is no gold pair.");
}

// ---- Each pair that is shown

function prepare() {
  localTimes(article);
  pages.keep(article.dataset.url, article);

  article.dataset.mode = settings.get("mode", "side");
  setSize(settings.get("size", "400"));
  const waiting = outbox.of(article.dataset.pair);
  if (waiting) article.dataset.verdict = waiting.prefer ?? "";
  const isOpen = article.dataset.inspection === "true" || article.dataset.verdict !== "";
  setBlind(settings.get("blind", "on") === "on" && !isOpen);
  describe(article.dataset.verdict || null, waiting ? "not stored yet" : "");
  showConflict();
  $("#keys-on").checked = settings.get("keys", "on") === "on";
  $("#advance-on").checked = settings.get("advance", "on") === "on";
  if ($("#reviewer")) $("#reviewer").value = settings.get("reviewer", "");
  for (const picture of $$(".picture")) picture.addEventListener("load", () => sharpen(picture), { once: true });
  pages.loadAhead(article.dataset.next, AHEAD);
}

function press(target) {
  const button = target.closest("button, a");
  if (!button || !article.contains(button)) return;
  if (button.dataset.mode) setMode(button.dataset.mode);
  else if (button.dataset.verdict) judge(button.dataset.verdict);
  else if (button.dataset.side) judge(verdictOf(button.dataset.side));
  else if (button.id === "undo") undo();
  else if (button.id === "next") next();
  else if (button.id === "mask-toggle") toggleMask();
  else if (button.id === "blind-toggle") {
    settings.set("blind", isBlind() ? "off" : "on");
    setBlind(!isBlind());
  } else if (button.id === "help-open") $("#help").showModal();
  else if (button.id === "help-close") $("#help").close();
}

const KEYS = {
  ArrowLeft: () => judge(verdictOf("left")),
  ArrowRight: () => judge(verdictOf("right")),
  ArrowUp: () => judge("tie"),
  ArrowDown: () => judge("reject"),
  t: () => judge("tie"),
  x: () => judge("reject"),
  u: undo,
  n: () => next(),
  b: () => press($("#blind-toggle") ?? article),
  m: toggleMask,
  1: () => setMode("side"),
  2: () => setMode("slider"),
  3: () => setMode("flicker"),
  "+": () => setSize(Number($("#size").value) + 64),
  "-": () => setSize(Number($("#size").value) - 64),
  "?": () => $("#help").showModal(),
};

document.addEventListener("keydown", (event) => {
  const isTyping = event.target.matches("input:not([type=checkbox], [type=range]), select, textarea");
  const isSliding = event.target.matches("input[type=range]") && event.key.startsWith("Arrow");
  if (event.ctrlKey || event.metaKey || event.altKey || event.repeat || isTyping || isSliding || $("#help").open) return;
  if (settings.get("keys", "on") !== "on" && event.key !== "?") return;
  const action = KEYS[event.key.length === 1 ? event.key.toLowerCase() : event.key];
  if (action === undefined) return;
  event.preventDefault();
  action();
});
document.addEventListener("click", (event) => press(event.target));
document.addEventListener("input", ({ target }) => {
  if (target.id === "size") setSize(target.value);
  else if (target.id === "opacity") article.style.setProperty("--opacity", target.value / 100);
  else if (target.id === "cut") article.style.setProperty("--cut", `${target.value}%`);
});
document.addEventListener("change", ({ target }) => {
  if (target.id === "compared") arrange();
  else if (target.id === "gold-verdict") storeGold(target.value);
  else if (target.id === "keys-on") settings.set("keys", target.checked ? "on" : "off");
  else if (target.id === "advance-on") settings.set("advance", target.checked ? "on" : "off");
  else if (target.id === "reviewer") {
    settings.set("reviewer", target.value.trim());
    nameReviewer();
    location.reload(); // with the verdicts of this reviewer
  }
});
document.addEventListener("toggle", ({ target }) => target.id === "gold" && target.open && loadGold(), true);
addEventListener("popstate", () => pages.show(location.pathname + location.search, { isBack: true }));
addEventListener("resize", () => $$(".picture").forEach(sharpen));
outbox.addEventListener("stored", ({ detail: { entry, pair } }) => {
  if (entry.pair !== article.dataset.pair) return;
  article.dataset.revision = pair.revision;
  if (outbox.of(entry.pair) === undefined) describe(entry.prefer, "stored");
});
outbox.addEventListener("conflict", showConflict);
if ($("#reviewer")) nameReviewer();
outbox.addEventListener("refused", ({ detail }) => toast(`The verdict was refused: ${detail.reason}`, true));

prepare();
