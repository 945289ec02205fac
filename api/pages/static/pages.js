// Pages of a queue that are loaded in advance: the `<article>` of each, with its images decoded.

const KEPT = 30; // pages that are kept for going back

export class Pages {
  constructor(id) {
    this.id = id;
    this.byUrl = new Map(); // promises of articles
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
