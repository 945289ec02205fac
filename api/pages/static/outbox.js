// Verdicts and answers on their way to the service. They are kept in localStorage until the service has stored them, so
// that a lost connection, a closed tab or an ended session loses none. A verdict is sent with the revision that the
// reviewer saw: a repeated one changes nothing, and a later verdict from another page is never overwritten unnoticed.
// Of several answers to a question of a preference test, the last one counts.

import { caller, send } from "./http.js";

const KEY = `dfusion.outbox:${caller}`;
const CONFLICTS = `dfusion.conflicts:${caller}`;
const MAX_PAUSE = 30_000;

function read(key, fallback) {
  try {
    return JSON.parse(localStorage.getItem(key)) ?? fallback;
  } catch {
    return fallback;
  }
}

function write(key, value) {
  localStorage.setItem(key, JSON.stringify(value));
}

class Outbox extends EventTarget {
  constructor() {
    super();
    this.revisions = new Map(); // the newest known revision of each pair
    this.sending = false;
    this.pause = 1000;
    this.problem = "";
  }

  get waiting() {
    return read(KEY, []);
  }

  get conflicts() {
    return read(CONFLICTS, {});
  }

  start() {
    addEventListener("online", () => this.retryNow());
    addEventListener("storage", (event) => event.key === KEY && this.show());
    this.show();
    this.send();
  }

  // Adds a verdict; `prefer` null removes the reviewer's earlier one.
  add(pair, prefer, revision, reviewer) {
    const earlier = this.waiting.findLast((entry) => entry.pair === pair);
    const expected = earlier ? earlier.revision + 1 : Math.max(revision, this.revisions.get(pair) ?? 0);
    const entry = { id: crypto.getRandomValues(new Uint32Array(2)).join("-"), pair, prefer, revision: expected, reviewer };
    write(KEY, [...this.waiting, entry]);
    this.show();
    this.send();
  }

  // Adds an answer to a question of a preference test; `choice` null removes it.
  addAnswer(url, choice, rater) {
    const id = crypto.getRandomValues(new Uint32Array(2)).join("-");
    write(KEY, [...this.waiting, { id, url, choice, rater }]);
    this.show();
    this.send();
  }

  // The answer that waits for this question, or undefined.
  answerTo(url) {
    return this.waiting.findLast((entry) => entry.url === url);
  }

  // The verdict that waits for this pair, or undefined.
  of(pair) {
    return this.waiting.findLast((entry) => entry.pair === pair);
  }

  resolve(pair) {
    const { [pair]: _, ...others } = this.conflicts;
    write(CONFLICTS, others);
    this.show();
  }

  retryNow() {
    this.pause = 1000;
    this.send();
  }

  async send() {
    if (this.sending) return;
    this.sending = true;
    clearTimeout(this.timer);
    const slow = setTimeout(() => this.show(true), 1000);
    try {
      while (this.waiting.length > 0 && (await this.sendFirst())) this.pause = 1000;
    } catch {
      this.problem = "The service cannot be reached"; // fetch failed
    } finally {
      this.sending = false;
      clearTimeout(slow);
    }
    if (this.waiting.length > 0) {
      this.timer = setTimeout(() => this.send(), this.pause);
      this.pause = Math.min(2 * this.pause, MAX_PAUSE);
    }
    this.show();
  }

  // Sends the oldest entry. Returns whether it left the outbox.
  async sendFirst() {
    const entry = this.waiting[0];
    const response = await (entry.url ? this.putAnswer(entry) : this.putVerdict(entry));
    if (response.ok) {
      const stored = await response.json();
      if (entry.url) this.answered(entry);
      else this.stored(entry, stored);
      return true;
    }
    if (response.status === 412) return this.changedMeanwhile(entry);
    if (response.status === 404 || response.status === 409 || response.status === 422) {
      const { detail } = await response.json();
      this.remove(entry);
      this.dispatchEvent(new CustomEvent("refused", { detail: { entry, reason: detail } }));
      return true;
    }
    if (response.status === 401) this.problem = "You are signed out";
    else if (response.status === 403) this.problem = "Your key may not review";
    else this.problem = "The service is busy";
    return false;
  }

  putVerdict(entry) {
    const body = { prefer: entry.prefer };
    if (!caller && entry.reviewer) body.reviewer = entry.reviewer;
    const headers = { "If-Match": `"${entry.revision}"` };
    return send(`/pairs/${entry.pair}/verdict`, { method: "PUT", body: JSON.stringify(body), headers });
  }

  putAnswer(entry) {
    const body = { choice: entry.choice };
    if (!caller) body.rater = entry.rater;
    return send(entry.url, { method: "PUT", body: JSON.stringify(body) });
  }

  answered(entry) {
    this.problem = "";
    this.remove(entry);
    this.dispatchEvent(new CustomEvent("answered", { detail: { entry } }));
  }

  stored(entry, pair) {
    this.problem = "";
    this.revisions.set(entry.pair, pair.revision);
    this.remove(entry);
    // other reviewers may have changed the revision that later verdicts on this pair were to have
    const others = this.waiting.map((other) => (other.pair === entry.pair ? { ...other, revision: pair.revision } : other));
    write(KEY, others);
    this.dispatchEvent(new CustomEvent("stored", { detail: { entry, pair } }));
  }

  // The reviewer's verdict has changed: the reply to an earlier attempt was lost, or it was changed from another page.
  async changedMeanwhile(entry) {
    const response = await send(`/pairs/${entry.pair}`);
    if (!response.ok) return false;
    const pair = await response.json();
    const reviewer = caller || entry.reviewer || null;
    const own = pair.verdicts.find((verdict) => verdict.reviewer === reviewer);
    const stored = own?.prefer ?? null;
    if (stored === entry.prefer) {
      this.stored(entry, pair);
      return true;
    }

    // later verdicts on the pair must not be stored either, or they would overwrite that from the other page
    const { prefer } = this.of(entry.pair);
    this.revisions.set(entry.pair, pair.revision);
    write(CONFLICTS, { ...this.conflicts, [entry.pair]: { prefer, stored } });
    write(KEY, this.waiting.filter((other) => other.pair !== entry.pair));
    this.dispatchEvent(new CustomEvent("conflict", { detail: { entry, pair } }));
    return true;
  }

  remove(entry) {
    write(KEY, this.waiting.filter((other) => other.id !== entry.id));
  }

  // The state in the header: nothing while all is stored.
  show(isSlow = false) {
    const element = document.getElementById("outbox");
    const count = this.waiting.length;
    const conflicts = Object.keys(this.conflicts);
    element.hidden = count === 0 && conflicts.length === 0;
    element.classList.toggle("bad", Boolean(this.problem) && count > 0);
    if (count > 0) {
      const noun = this.waiting.every((entry) => entry.url) ? "answer" : "verdict";
      const verdicts = count === 1 ? `1 ${noun} is` : `${count} ${noun}s are`;
      if (!this.problem && !isSlow) element.hidden = conflicts.length === 0;
      element.textContent = this.problem ? `${this.problem}: ${verdicts} kept in this browser` : "Saving…";
      if (this.problem === "You are signed out") {
        const link = document.createElement("a");
        link.href = `/sign-in?next=${encodeURIComponent(location.pathname + location.search)}`;
        link.textContent = "Sign in";
        element.append(" ", link);
      }
    } else if (conflicts.length > 0) {
      const link = document.createElement("a");
      link.href = `/pairs/${encodeURIComponent(conflicts[0])}`;
      link.textContent = conflicts.length === 1 ? "1 verdict differs" : `${conflicts.length} verdicts differ`;
      element.replaceChildren(link);
    }
  }
}

export const outbox = new Outbox();
