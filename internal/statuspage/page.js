"use strict";
// Fetches the page again when the server announces a change, and replaces the parts that differ.
(() => {
  const connection = document.getElementById("connection");
  const input = document.getElementById("q");
  let running = false, again = false, timer = 0;

  function show(text, state) {
    if (connection.textContent !== text) connection.textContent = text;
    connection.dataset.state = state;
  }

  function replace(old, next) {
    const key = "[data-key]";
    const open = new Set([...old.querySelectorAll("details[open]")].map((d) => d.dataset.key));
    const rows = new Set([...old.querySelectorAll("tr" + key)].map((r) => r.dataset.key));
    next.querySelectorAll("details" + key).forEach((d) => { d.open = open.has(d.dataset.key); });
    if (rows.size > 0) {
      next.querySelectorAll("tr" + key).forEach((r) => r.classList.toggle("new", !rows.has(r.dataset.key)));
    }
    const focus = old.contains(document.activeElement) ? document.activeElement.getAttribute("href") : null;
    old.replaceWith(next);
    if (focus) [...next.querySelectorAll("a")].find((a) => a.getAttribute("href") === focus)?.focus();
  }

  async function refresh() {
    if (running) { again = true; return; }
    running = true;
    try {
      const response = await fetch(location.pathname + location.search, {cache: "no-store"});
      if (response.ok) {
        const page = new DOMParser().parseFromString(await response.text(), "text/html");
        document.querySelectorAll("[data-live]").forEach((old) => {
          const next = page.getElementById(old.id);
          if (!next || next.innerHTML === sources.get(old.id)) return;
          sources.set(old.id, next.innerHTML);
          replace(old, next);
        });
      }
    } catch {
      show("Offline", "off"); // the stream reports when the server is back
    } finally {
      running = false;
      if (again) { again = false; refresh(); }
    }
  }

  // The HTML of each part as the server sent it, without open details and marks.
  const sources = new Map([...document.querySelectorAll("[data-live]")].map((e) => [e.id, e.innerHTML]));

  input.addEventListener("input", () => {
    clearTimeout(timer);
    timer = setTimeout(() => {
      const query = new URLSearchParams(location.search);
      query.delete("page");
      if (input.value.trim()) query.set("q", input.value.trim()); else query.delete("q");
      const text = query.toString();
      history.replaceState(null, "", text ? "/?" + text : "/");
      refresh();
    }, 200);
  });

  function follow() {
    const stream = new EventSource("/live");
    stream.onmessage = () => { show("Live", "on"); if (!document.hidden) refresh(); };
    stream.onerror = () => {
      show("Offline", "off");
      if (stream.readyState === EventSource.CLOSED) setTimeout(() => { refresh(); follow(); }, 10000);
    };
  }
  document.addEventListener("visibilitychange", () => { if (!document.hidden) refresh(); });
  follow();
})();
