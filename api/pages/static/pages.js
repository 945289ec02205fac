// Pages of a queue that are loaded in advance: the `<article>` of each, with its images decoded.

import { toast } from "./http.js";

const KEPT = 30; // pages that are kept for going back

export class Pages {
  // The articles have this id. `onShow` gets each one that is shown.
  constructor(id, onShow) {
    this.id = id;
    this.onShow = onShow;
    this.byUrl = new Map(); // promises of articles
    this.isLoading = false; // keys for the next article must not answer the one that is shown
  }

  // Shows a page of the queue. Returns whether it is shown.
  async show(url, { isBack = false } = {}) {
    if (this.isLoading) return false;
    this.isLoading = true;
    let loaded;
    try {
      loaded = await this.load(url);
    } catch (error) {
      if (error instanceof TypeError) toast(`The ${this.id} cannot be loaded: the service cannot be reached.`, true);
      else location.assign(url); // its error page, or the sign-in
      return false;
    } finally {
      this.isLoading = false;
    }
    document.getElementById(this.id).replaceWith(loaded);
    if (!isBack) history.pushState(null, "", url);
    this.onShow(loaded);
    window.scrollTo({ top: 0 });
    return true;
  }

  load(url) {
    if (!this.byUrl.has(url)) {
      const page = fetch(url, { headers: { Accept: "text/html" } }).then(async (response) => {
        if (!response.ok || response.redirected) throw new Error(`${response.status}`);
        const loaded = new DOMParser().parseFromString(await response.text(), "text/html").getElementById(this.id);
        if (loaded === null) throw new Error(`no ${this.id}`);
        const adopted = document.adoptNode(loaded);
        await Promise.allSettled([...adopted.querySelectorAll(".picture")].map((picture) => picture.decode()));
        return adopted;
      });
      this.byUrl.set(url, page);
      page.catch(() => this.byUrl.delete(url));
    }
    return this.byUrl.get(url);
  }

  // Keeps an article that is shown, for going back.
  keep(url, article) {
    this.byUrl.set(url, Promise.resolve(article));
    while (this.byUrl.size > KEPT) this.byUrl.delete(this.byUrl.keys().next().value);
  }

  // Loads the next pages of the queue.
  async loadAhead(url, count) {
    for (let n = 0; n < count && url; n++) {
      try {
        url = (await this.load(url)).dataset.next;
      } catch {
        return; // the next attempt is when the page is shown
      }
    }
  }
}
