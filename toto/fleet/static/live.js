// Follows the fleet: at each change the page is fetched again, and what is in <main> takes the place of what was.
"use strict";
const events = new EventSource(document.currentScript.dataset.events);
const live = document.getElementById("live");
let busy = false, again = false;

async function renew() {
  if (busy) { again = true; return; }
  busy = true;
  try {
    const answer = await fetch(location.href, { headers: { Accept: "text/html" } });
    if (!answer.ok) return;
    const page = new DOMParser().parseFromString(await answer.text(), "text/html");
    const main = document.getElementById("main");
    const focused = main.contains(document.activeElement) ? document.activeElement.getAttribute("href") : null;
    const open = [...main.querySelectorAll("details")].map((each) => each.open);
    main.replaceChildren(...page.getElementById("main").childNodes);
    [...main.querySelectorAll("details")].forEach((each, number) => { each.open = open[number] ?? each.open; });
    if (focused) main.querySelector(`a[href="${CSS.escape(focused)}"]`)?.focus({ preventScroll: true });
  } finally {
    busy = false;
    if (again) { again = false; renew(); }
  }
}

events.addEventListener("change", renew);
events.addEventListener("open", () => { live.textContent = "live"; });
events.addEventListener("error", () => { live.textContent = "not live: toto does not answer"; });
setInterval(renew, 60000);  // ages
