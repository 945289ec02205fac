// Starts a job from a page, and follows it to its end without leaving the page.

import { send } from "./http.js";

const FIRST_PAUSE = 500;
const MAX_PAUSE = 4000;
const FINAL = new Set(["succeeded", "failed", "cancelled"]);

// A refused request; `problems` names its fields by JSON pointers.
export class RefusedError extends Error {
  constructor(problem) {
    super(problem.detail);
    this.problems = problem.errors ?? [];
  }
}

async function read(path, options) {
  const response = await send(path, options);
  const body = await response.json();
  if (!response.ok) throw new RefusedError(body);
  return body;
}

export const get = (path) => read(path);
export const start = (path, body) => read(path, { method: "POST", body: JSON.stringify(body) });

function describe({ state, progress }) {
  if (state === "queued") return "Waiting for a worker…";
  if (state !== "running") return `The job is ${state}.`;
  const part = progress.total ? `, ${progress.done} of ${progress.total}` : "";
  return progress.stage ? `Working: ${progress.stage}${part}…` : "Working…";
}

// Returns the job when it has succeeded, and null once `isWanted` is false. Throws an error if it has not succeeded.
export async function follow(id, say, isWanted) {
  let pause = FIRST_PAUSE;
  while (isWanted()) {
    try {
      const job = await get(`/jobs/${id}`);
      if (FINAL.has(job.state)) {
        if (job.state === "succeeded") return job;
        throw new RefusedError({ detail: job.error?.message ?? `The job is ${job.state}.` });
      }
      say(describe(job));
    } catch (error) {
      if (!(error instanceof TypeError)) throw error;
      say("The service cannot be reached; trying again…");
    }
    await new Promise((resolve) => setTimeout(resolve, pause));
    pause = Math.min(1.3 * pause, MAX_PAUSE);
  }
  return null;
}

// Shows each problem at the field with its pointer, in a form of `[data-pointer]` fields. False if none has a field.
export function showProblems(form, problems) {
  let first = null;
  for (const field of form.querySelectorAll("[data-pointer]")) {
    const { pointer } = field.dataset;
    const own = problems.filter((problem) => problem.pointer === pointer || problem.pointer.startsWith(`${pointer}/`));
    const control = field.querySelector("input, select");
    field.querySelector(".field-error").textContent = own.map((problem) => problem.message).join("; ");
    if (own.length) control.setAttribute("aria-invalid", "true");
    else control.removeAttribute("aria-invalid");
    if (own.length) first ??= control;
  }
  first?.focus();
  return first !== null;
}

// Starts a job from an element with a form, and calls `show(job)` when it has succeeded.
export async function run(element, path, body, show) {
  const form = element.querySelector("form");
  const button = form.querySelector("button");
  const state = form.querySelector(".job-state");
  const say = (text) => (state.textContent = text);
  button.disabled = true;
  showProblems(form, []);
  try {
    say("Starting…");
    const { id } = await start(path, body);
    const job = await follow(id, say, () => element.isConnected);
    if (job !== null) await show(job);
    say("");
  } catch (error) {
    const isAtField = showProblems(form, error.problems ?? []);
    say(isAtField ? "" : reason(error));
  }
  button.disabled = false;
}

export function reason(error) {
  return error instanceof TypeError ? "The service cannot be reached." : error.message;
}

// The element with this id on the page at this address.
export async function elementOf(url, id) {
  const response = await fetch(url, { headers: { Accept: "text/html" } });
  if (!response.ok || response.redirected) throw new Error("The page cannot be loaded.");
  const loaded = new DOMParser().parseFromString(await response.text(), "text/html").getElementById(id);
  if (loaded === null) throw new Error("The page cannot be loaded.");
  return document.adoptNode(loaded);
}
