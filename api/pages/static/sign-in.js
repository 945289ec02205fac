// A link from another site brings no cookie (SameSite=Strict), although this browser may be signed in: ask once more.

const target = document.querySelector("form[data-next]").dataset.next;
const response = await fetch(target, { method: "HEAD", headers: { Accept: "text/html" } });
if (response.ok && !response.redirected) location.replace(target);
