// The questions of a preference test: answers by keyboard, undo, and the next question ready before it is needed.

import { toast } from "./http.js";
import { outbox } from "./outbox.js";
import { sharpen } from "./page.js";
import { Pages } from "./pages.js";

const AHEAD = 3; // questions that are loaded in advance
const KEYS_ON = "dfusion.review.keys";

const pages = new Pages("question", (shown) => {
  article = shown;
  prepare();
});
const given = []; // answers of this sitting, for undo
let article = document.getElementById("question");
let isFinishing = false; // the last answers are being sent

const $ = (selector) => article.querySelector(selector);
const $$ = (selector) => article.querySelectorAll(selector);

function mark(note = "") {
  const { choice } = article.dataset;
  for (const button of $$("button[data-choice]")) button.setAttribute("aria-pressed", button.dataset.choice === choice);
  const answer = choice === "none" ? "none" : `image ${choice}`;
  $("#answer-note").textContent = note || (choice ? `Your answer: ${answer}` : "");
}

function choose(text) {
  if (article.dataset.rating !== "true" || pages.isLoading || isFinishing) return;
  if ($(`button[data-choice="${text}"]`) === null) return; // a number without an image
  const { url, answer, choice, rater } = article.dataset;
  given.push({ url, answer, before: choice, rater });
  store(answer, text, rater);
  article.dataset.choice = text;
  mark();
  next();
}

function store(answer, text, rater) {
  outbox.addAnswer(answer, text === "" ? null : text === "none" ? text : Number(text), rater);
}

function undo() {
  if (pages.isLoading) return;
  const last = given.pop();
  if (last === undefined) return toast("Nothing to undo on this page.");
  isFinishing = false;
  store(last.answer, last.before, last.rater);
  const restore = () => {
    article.dataset.choice = last.before;
    mark(last.before ? "" : "The answer is removed.");
  };
  if (last.answer === article.dataset.answer) return restore();
  pages.show(last.url).then((isShown) => isShown && restore());
}

function next() {
  if (article.dataset.next) return void pages.show(article.dataset.next);
  isFinishing = true;
  finish();
  if (outbox.waiting.length > 0) toast("This was the last question. Your answers are being sent.");
}

// After the last question: questions that were skipped, or the page of the test. The service must know all answers.
function finish() {
  if (isFinishing && outbox.waiting.length === 0) location.assign(article.dataset.end);
}

function prepare() {
  pages.keep(article.dataset.url, article);
  const waiting = outbox.answerTo(article.dataset.answer);
  if (waiting) article.dataset.choice = waiting.choice ?? "";
  mark();
  $("#keys-on").checked = localStorage.getItem(KEYS_ON) !== "off";
  for (const picture of $$(".picture")) {
    sharpen(picture);
    picture.addEventListener("load", () => sharpen(picture), { once: true });
  }
  pages.loadAhead(article.dataset.next, AHEAD);
}

const KEYS = {
  "=": () => choose("none"),
  0: () => choose("none"),
  u: undo,
  n: next,
  "?": () => $("#help").showModal(),
};

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.repeat || $("#help").open) return;
  if (localStorage.getItem(KEYS_ON) === "off" && event.key !== "?") return;
  const action = /^[1-9]$/.test(event.key) ? () => choose(event.key) : KEYS[event.key.toLowerCase()];
  if (action === undefined) return;
  event.preventDefault();
  action();
});
document.addEventListener("click", ({ target }) => {
  const button = target.closest("button");
  if (!button || !article.contains(button)) return;
  if (button.dataset.choice) choose(button.dataset.choice);
  else if (button.id === "undo") undo();
  else if (button.id === "next") next();
  else if (button.id === "help-open") $("#help").showModal();
  else if (button.id === "help-close") $("#help").close();
});
document.addEventListener("change", ({ target }) => {
  if (target.id === "keys-on") localStorage.setItem(KEYS_ON, target.checked ? "on" : "off");
});
addEventListener("pageshow", () => (isFinishing = false)); // back from the page after the last question
addEventListener("popstate", () => pages.show(location.pathname + location.search, { isBack: true }));
addEventListener("resize", () => $$(".picture").forEach(sharpen));
outbox.addEventListener("answered", finish);
outbox.addEventListener("refused", ({ detail }) => toast(`The answer was refused: ${detail.reason}`, true));

prepare();
