"use strict";
// Texts reach the page as text nodes only: nothing in the data can become an element.
(() => {
  const PAGE_ROWS = 50;
  const data = JSON.parse(document.getElementById("data").textContent);
  const $ = (id) => document.getElementById(id);
  const number = (value) => (value === null ? "" : String(Math.round(value * 1000) / 1000));

  function make(name, className, ...children) {
    const element = document.createElement(name);
    if (className) element.className = className;
    element.append(...children);
    return element;
  }

  // ---- charts: the values at the step that is pointed at
  data.charts.forEach((chart, index) => {
    const figure = document.querySelector(`[data-chart="${index}"]`);
    const svg = figure.querySelector("svg"), cursor = svg.querySelector(".cursor"), note = figure.querySelector(".note");
    const [low, high, left, right] = chart.x, said = note.textContent;
    const steps = [...new Set(chart.lines.flatMap(([, points]) => points.map((point) => point[0])))].sort((a, b) => a - b);
    const place = (x) => left + ((x - low) / (high - low)) * (right - left);
    svg.addEventListener("pointermove", (event) => {
      const box = svg.getBoundingClientRect(), x = ((event.clientX - box.left) / box.width) * svg.viewBox.baseVal.width;
      const near = steps.reduce((best, step) => (Math.abs(place(step) - x) < Math.abs(place(best) - x) ? step : best));
      cursor.setAttribute("x1", place(near));
      cursor.setAttribute("x2", place(near));
      cursor.setAttribute("visibility", "visible");
      const found = chart.lines.map(([name, points]) => [name, points.find((point) => point[0] === near)]);
      const values = found.filter(([, point]) => point).map(([name, point]) => {
        const spread = point.length === 4 ? ` (${Number(point[2].toPrecision(3))} – ${Number(point[3].toPrecision(3))})` : "";
        return `${name} ${Number(point[1].toPrecision(4))}${spread}`;
      });
      note.textContent = `${chart.unit} ${Number(near.toPrecision(4))}: ${values.join(", ")}`;
    });
    svg.addEventListener("pointerleave", () => {
      cursor.setAttribute("visibility", "hidden");
      note.textContent = said;
    });
  });

  const copy = $("copy");
  if (copy) copy.addEventListener("click", async () => {
    const code = copy.parentElement.querySelector("code");
    try {
      await navigator.clipboard.writeText(code.textContent);
      copy.textContent = "copied";
    } catch {
      getSelection().selectAllChildren(code);
    }
  });
  if (!$("rows")) return;

  // ---- which rows are shown; the address keeps it, so that a view can be sent as a link
  const first = { filter: data.filters[0].key, class: "", cell: "", q: "", order: "worst", page: "1" };
  const state = { ...first, ...Object.fromEntries(new URLSearchParams(location.hash.slice(1))) };
  if (!data.filters.some((filter) => filter.key === state.filter)) state.filter = first.filter;
  let shown = [];

  function texts(row) {
    row.haystack ??= [row.id, row.where ?? "", ...row.turns.flatMap((turn) => [turn.question, ...turn.references, ...turn.answers])]
      .join("\n").toLowerCase();
    return row.haystack;
  }

  function choose() {
    const query = state.q.trim().toLowerCase();
    shown = data.rows.filter((row) =>
      (state.filter === "all" || row.flags.includes(state.filter)) &&
      (state.class === "" || row.turns.some((turn) => turn.class === Number(state.class))) &&
      (state.cell === "" || row.turns.some((turn) => `${turn.class}-${turn.answered}` === state.cell)) &&
      (query === "" || texts(row).includes(query)));
    if (state.order === "data") shown.sort((a, b) => a.index - b.index);
  }

  function update(changes, focus) {
    Object.assign(state, "page" in changes ? {} : { page: "1" }, changes);
    choose();
    render();
    const changed = Object.entries(state).filter(([key, value]) => key in first && value !== first[key]);
    try {
      history.replaceState(null, "", "#" + new URLSearchParams(changed));
    } catch { /* a page without an address of its own */ }
    if (focus) focus();
  }

  // ---- a row
  const observer = new IntersectionObserver((entries) => {
    for (const entry of entries) if (entry.isIntersecting) attach(entry.target);
  }, { rootMargin: "600px" });

  function attach(image) {
    observer.unobserve(image);
    image.src = data.pictures[image.dataset.picture];
  }

  // Image tags as such, and what was searched for.
  function rich(text) {
    const query = state.q.trim().toLowerCase(), parts = [];
    for (const piece of text.split(/(<\|image_\d+\|>)/)) {
      if (/^<\|image_\d+\|>$/.test(piece)) {
        parts.push(make("span", "tag", piece));
        continue;
      }
      let start = 0;
      if (query) {
        const lower = piece.toLowerCase();
        for (let at = lower.indexOf(query); at >= 0 && lower.length === piece.length; at = lower.indexOf(query, start)) {
          parts.push(piece.slice(start, at), make("mark", "", piece.slice(at, at + query.length)));
          start = at + query.length;
        }
      }
      parts.push(piece.slice(start));
    }
    return parts;
  }

  function verdict(score) {
    if (score === null) return ["", ""];
    if (score >= data.best - 1e-9) return ["good", "✓ "];
    return score > 0 ? ["some", "≈ "] : ["bad", "✗ "];
  }

  function answerLine(name, text, score, chance, shownValue) {
    const [colour, sign] = verdict(score);
    const content = text.trim() === "" ? make("span", `answer empty ${colour}`, `${sign}(empty answer)`)
      : make("span", `answer ${colour}`, sign, ...rich(text));
    const head = make("th", "", name);
    head.scope = "row";
    const value = make("td", "value", shownValue ?? number(score));
    if (chance) value.title = chance;
    return make("tr", "", head, make("td", "", content), value);
  }

  // Another row with the same question about the same picture.
  function twinLine(twin) {
    const head = make("th", "", twin.how);
    head.scope = "row";
    head.title = twin.exactly;
    return make("tr", "twin", head, make("td", "", ...rich(twin.text), make("small", "", twin.where)), make("td", "value"));
  }

  function turnPart(turn) {
    const part = make("div", "turn", make("div", "question", ...rich(turn.question)));
    const head = make("th", "", data.expected ?? "expected");
    head.scope = "row";
    const expected = make("td", ""), [likelihood, exactly] = turn.given ?? ["", ""];
    turn.references.forEach((text, index) => expected.append(...(index ? [make("span", "or", "or")] : []), ...rich(text)));
    const value = make("td", "value", likelihood);
    value.title = exactly;
    const body = make("tbody", "", make("tr", "", head, expected, value));
    // Answers that did not change from one evaluation to the next share a line.
    for (let from = 0, to; from < data.columns.length; from = to) {
      to = from + 1;
      const text = turn.answers[from];
      if (text === null) continue;
      while (data.merge && to < data.columns.length && turn.answers[to] === text) to += 1;
      const name = to - from > 1 ? `${data.columns[from]} – ${data.columns[to - 1]}` : data.columns[from];
      body.append(answerLine(name, text, turn.scores[to - 1], turn.chances && turn.chances[to - 1], turn.values && turn.values[to - 1]));
    }
    body.append(...(turn.twins ?? []).map(twinLine));
    part.append(make("table", "answers", body));
    return part;
  }

  function rowPart(row) {
    const mark = row.score === null ? "" : `${data.mark ?? "score"} ${number(row.score)}`;
    const place = row.where ? [make("span", "where", row.where)] : [];
    const head = make("div", "head", make("span", "id", row.id), ...place, make("span", "mark", mark));
    const text = make("div", "", head,
      ...row.turns.map(turnPart));
    const part = make("article", "row", text);
    part.tabIndex = -1;
    if (!row.pictures.length) {
      part.classList.add("plain");
      return part;
    }
    const pictures = make("div", "pictures");
    row.pictures.forEach((picture, place) => {
      if (picture < 0) {
        pictures.append(make("span", "", picture === -1 ? "picture cannot be read" : "picture left out, to bound the file"));
        return;
      }
      const image = make("img", "");
      image.dataset.picture = picture;
      const caption = row.captions && row.captions[place];
      image.alt = caption ? `picture of ${caption}` : `picture ${place + 1} of ${row.pictures.length}`;
      image.decoding = "async";
      observer.observe(image);
      const button = make("button", "", image, ...(caption ? [make("small", "", caption)] : []));
      button.type = "button";
      button.title = "show large";
      button.addEventListener("click", () => enlarge(button, row, place));
      pictures.append(button);
    });
    part.prepend(pictures);
    return part;
  }

  // ---- the list
  function render() {
    const pages = Math.max(1, Math.ceil(shown.length / PAGE_ROWS));
    const page = Math.min(pages, Math.max(1, Number(state.page) || 1)), start = (page - 1) * PAGE_ROWS;
    state.page = String(page);
    observer.disconnect();
    const part = shown.slice(start, start + PAGE_ROWS);
    $("rows").replaceChildren(...(part.length ? part.map(rowPart) : [make("p", "card muted nothing", "No row fits.")]));
    const places = shown.length ? `${(start + 1).toLocaleString("en")} – ${(start + part.length).toLocaleString("en")} of ` : "";
    $("count").textContent = `${places}${shown.length.toLocaleString("en")} rows`;
    for (const button of document.querySelectorAll("[data-filter]")) {
      button.setAttribute("aria-pressed", String(button.dataset.filter === state.filter));
    }
    if ($("class")) $("class").value = state.class;
    $("order").value = state.order;
    if (document.activeElement !== $("search")) $("search").value = state.q;
    $("chosen").hidden = state.cell === "";
    if (state.cell !== "") {
      const [expected, answered] = state.cell.split("-").map(Number);
      const name = answered < data.classes.length ? data.classes[answered] : "anything else";
      $("chosen").firstElementChild.textContent = `Only “${data.classes[expected]}” answered with “${name}”`;
    }
    renderPages(page, pages);
  }

  function renderPages(page, pages) {
    const near = new Set([1, 2, page - 1, page, page + 1, pages - 1, pages].filter((at) => at >= 1 && at <= pages));
    const buttons = [];
    let last = 0;
    for (const at of pages > 1 ? [...near].sort((a, b) => a - b) : []) {
      if (at > last + 1) buttons.push(make("span", "muted", "…"));
      const button = make("button", "", String(at));
      button.type = "button";
      button.setAttribute("aria-label", `page ${at}`);
      if (at === page) button.setAttribute("aria-current", "page");
      button.addEventListener("click", () => turnTo(at));
      buttons.push(button);
      last = at;
    }
    $("pages").replaceChildren(...buttons);
  }

  function turnTo(page) {
    update({ page: String(page) }, () => {
      $("answers").scrollIntoView();
      const first = $("rows").querySelector(".row");
      if (first) first.focus({ preventScroll: true });
    });
  }

  // ---- a picture, large
  let opener = null, large = null;

  function enlarge(button, row, place) {
    opener = button;
    large = { row, place };
    const image = $("large").querySelector("img"), count = row.pictures.length;
    image.src = data.pictures[row.pictures[place]];
    image.alt = `picture ${place + 1} of ${count}`;
    const caption = row.captions && row.captions[place];
    $("large").querySelector("p").textContent = caption || (count > 1 ? `${row.id}, picture ${place + 1} of ${count}` : row.id);
    if (!$("large").open) $("large").showModal();
  }

  function step(by) {
    const buttons = [...$("rows").querySelectorAll(".pictures button")], next = buttons[buttons.indexOf(opener) + by];
    if (next) next.click();
  }

  $("large").addEventListener("close", () => opener && opener.focus());
  $("large").addEventListener("click", (event) => {
    if (event.target.tagName !== "IMG") $("large").close();
  });

  // ---- what a person does
  for (const button of document.querySelectorAll("[data-filter]")) {
    button.addEventListener("click", () => update({ filter: button.dataset.filter, cell: "" }));
  }
  for (const button of document.querySelectorAll("[data-cell]")) {
    button.addEventListener("click", () =>
      update({ cell: button.dataset.cell, class: "", filter: "all" }, () => $("answers").scrollIntoView()));
  }
  $("all").addEventListener("click", () => update({ cell: "" }));
  if ($("class")) $("class").addEventListener("change", () => update({ class: $("class").value, cell: "" }));
  $("order").addEventListener("change", () => update({ order: $("order").value }));
  let timer = 0;
  $("search").addEventListener("input", () => {
    clearTimeout(timer);
    timer = setTimeout(() => update({ q: $("search").value }), 80);
  });
  addEventListener("beforeprint", () => document.querySelectorAll("#rows img").forEach(attach));
  addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const field = ["INPUT", "SELECT", "TEXTAREA"].includes(event.target.tagName);
    if ($("large").open) {
      if (event.key === "ArrowRight" || event.key === "ArrowLeft") step(event.key === "ArrowRight" ? 1 : -1);
      return;
    }
    if (event.target === $("search") && event.key === "Escape") {
      clearTimeout(timer);
      $("search").value = "";
      update({ q: "" }, () => $("search").blur());
    } else if (event.key === "/" && !field) {
      event.preventDefault();
      $("search").focus();
    } else if (!field && (event.key === "ArrowRight" || event.key === "ArrowLeft")) {
      const page = Number(state.page) + (event.key === "ArrowRight" ? 1 : -1);
      if (page >= 1 && page <= Math.ceil(shown.length / PAGE_ROWS)) turnTo(page);
    } else if ((event.key === "ArrowDown" || event.key === "ArrowUp") && event.target.closest("#answers") && !field) {
      const rows = [...$("rows").querySelectorAll(".row")], here = rows.indexOf(event.target.closest(".row"));
      const next = rows[here + (event.key === "ArrowDown" ? 1 : -1)];
      if (next) {
        event.preventDefault();
        next.focus({ preventScroll: true });
        next.scrollIntoView({ block: "nearest" });
      }
    }
  });

  choose();
  render();
})();
