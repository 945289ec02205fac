// A run that is still going: its events over SSE refresh the page's regions and charts as they come.

import { charts } from "./charts.js";
import { refresh } from "./page.js";

const run = document.getElementById("run");
const LIVE = "live";
const FIRST_PAUSE = 1000;
const MAX_PAUSE = 15_000;
const REFRESH_MILLISECONDS = 1500; // at most one refresh in this time, however many events come
const MEASURING = new Set(["score", "select", "verify", "train", "evaluate", "compare"]);

let timer;
let chartsAreOld = false;
let state = "";

function say(text) {
  state = text;
  const element = document.getElementById("live-state");
  if (element === null) return;
  element.textContent = text;
  element.classList.toggle("is-live", text === LIVE);
}

function schedule() {
  timer ??= setTimeout(async () => {
    timer = undefined;
    try {
      await refresh();
      say(state);
      if (chartsAreOld) await charts();
      chartsAreOld = false;
    } catch {
      // the stream says that the connection is lost
    }
  }, REFRESH_MILLISECONDS);
}

function receive(message) {
  if (message.event === "end") return;
  run.dataset.lastEvent = message.id;
  const event = JSON.parse(message.data);
  const hasNumbers = event.kind.startsWith("round.") || (event.kind === "stage.succeeded" && MEASURING.has(event.data.stage));
  chartsAreOld ||= hasNumbers || event.kind.startsWith("job.");
  schedule();
}

// Reads server-sent events. EventSource cannot start after a given event, and would first repeat the whole log.
async function follow() {
  const headers = { Accept: "text/event-stream", "Last-Event-ID": run.dataset.lastEvent };
  const response = await fetch(`/jobs/${run.dataset.job}/events`, { headers });
  if (response.status === 204) return true;
  if (!response.ok) throw new Error(response.status);
  say(LIVE);

  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let buffer = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return false;
    buffer += value.replaceAll("\r", "");
    const parts = buffer.split("\n\n");
    buffer = parts.pop();
    for (const part of parts) {
      const message = parse(part);
      if (message.event === "end") return true;
      if (message.data) receive(message);
    }
  }
}

function parse(text) {
  const message = {};
  for (const line of text.split("\n")) {
    const colon = line.indexOf(":");
    if (colon > 0) message[line.slice(0, colon)] = line.slice(colon + 1).trimStart();
  }
  return message;
}

async function followUntilEnd() {
  let pause = FIRST_PAUSE;
  for (;;) {
    try {
      if (await follow()) break;
      pause = FIRST_PAUSE;
    } catch {
      say("connection lost, trying again");
      pause = Math.min(2 * pause, MAX_PAUSE);
    }
    await new Promise((resolve) => setTimeout(resolve, pause));
  }
  say("");
  chartsAreOld = true;
  schedule();
}

charts();
if (run.dataset.liveRun === "true") {
  followUntilEnd();
  // the steps within a stage are no events
  setInterval(() => document.visibilityState === "visible" && document.querySelector(".state-running") && schedule(), 5000);
}
