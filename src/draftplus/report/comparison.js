"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const tip = document.getElementById("tip");
  const search = document.getElementById("search");
  const off = new Set(data.series.flatMap((one, i) => (one.shown ? [] : [i])));
  let words = [];

  // Which runs and series are shown

  const runShown = (run) => !off.has(run.series) && words.every((word) => run.text.includes(word));

  function apply() {
    for (const element of document.querySelectorAll("[data-series]")) {
      const run = element.dataset.run === undefined ? null : data.runs[element.dataset.run];
      const text = element.dataset.text;
      const found = text === undefined || words.every((word) => text.includes(word));
      element.classList.toggle("off", run ? !runShown(run) : off.has(+element.dataset.series) || !found);
    }
    document.querySelectorAll("figure[data-reward]").forEach(ring);
    const shown = data.runs.filter(runShown).length;
    document.getElementById("count").textContent =
      shown === data.runs.length ? "" : `${shown} of ${data.runs.length} runs`;
    hide();
  }

  // Rings: the rule of `rings` in points.py, for the marks that are shown

  function ring(figure) {
    const reward = figure.dataset.reward;
    const numbers = new Set([...figure.querySelectorAll(".ring")].map((one) => +one.dataset.point));
    const shown = [...numbers].map((i) => data.points[i]).filter((point) => !off.has(point.series));
    const marks = shown.map((point) => ({ point, both: [point.rewards[reward], point.lpips] }));
    const known = [0, 1].map((i) => marks.map((mark) => mark.both[i][1]).filter(Boolean));
    const largest = known.map((errors) => (errors.length ? Math.max(...errors) : Infinity));
    const clear = (one, other) =>
      [0, 1].some((i) => {
        const [[mine, error], [its, itsError]] = [one.both[i], other.both[i]];
        return mine - its > Math.hypot(error, itsError ?? largest[i]);
      });
    let best = -Infinity;
    const order = (a, b) => b.both[0][0] - a.both[0][0] || b.both[1][0] - a.both[1][0];
    const front = [...marks].sort(order).filter((mark) => mark.both[1][0] > best && ((best = mark.both[1][0]), true));
    const sure = front.filter((mark) => mark.both.every(([, error]) => error !== null));
    const ringed = sure.filter((one) => marks.every((other) => other === one || clear(one, other)));
    const places = new Set(ringed.map((mark) => data.points.indexOf(mark.point)));
    for (const one of figure.querySelectorAll(".ring")) one.classList.toggle("off", !places.has(+one.dataset.point));
    const notes = [[front.length > sure.length, "unknown"], [sure.length > ringed.length, "close"]];
    const told = notes.filter(([holds]) => holds).map(([, which]) => data.notes[which]);
    figure.querySelector(".note").textContent = told.join(" ");
  }

  for (const chip of document.querySelectorAll(".chip")) {
    const number = +chip.dataset.chip;
    const show = (on) => {
      chip.setAttribute("aria-pressed", on);
      on ? off.delete(number) : off.add(number);
    };
    chip.addEventListener("click", () => {
      show(off.has(number));
      apply();
    });
  }
  search.addEventListener("input", () => {
    words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    apply();
  });

  // What lies under the pointer

  const near = 26; // pixels of the screen

  function hide() {
    tip.hidden = true;
    for (const element of document.querySelectorAll(".lit")) element.classList.remove("lit");
    for (const element of document.querySelectorAll(".dim")) element.classList.remove("dim");
  }

  function line(parent, kind, text) {
    const element = document.createElement(kind);
    element.textContent = text;
    parent.append(element);
    return element;
  }

  function table(rows) {
    const list = document.createElement("dl");
    for (const [name, value] of rows) {
      line(list, "dt", name);
      line(list, "dd", value);
    }
    return list;
  }

  function place(x, y) {
    tip.hidden = false;
    const { width, height } = tip.getBoundingClientRect();
    const left = x + 16 + width > innerWidth - 8 ? x - 16 - width : x + 16;
    tip.style.left = `${Math.max(8, Math.min(left, innerWidth - width - 8))}px`;
    tip.style.top = `${Math.max(8, Math.min(y - height / 2, innerHeight - height - 8))}px`;
  }

  function marksOf(svg) {
    svg.marks ??= [...svg.querySelectorAll(".mark")].map((element) => {
      const use = element.querySelector("use");
      return { element, x: +use.getAttribute("x"), y: +use.getAttribute("y") };
    });
    return svg.marks.filter((mark) => !mark.element.classList.contains("off"));
  }

  function runsOf(svg) {
    svg.runs ??= [...svg.querySelectorAll(".run")].map((element) => {
      // a path of one straight piece for each recorded step
      const d = element.querySelector("path")?.getAttribute("d") ?? "";
      const vertices = [...d.matchAll(/[ML]\s*([-\d.e]+)[\s,]+([-\d.e]+)/g)].map((m) => [+m[1], +m[2]]);
      return { element, number: +element.dataset.run, vertices };
    });
    return svg.runs.filter((run) => !run.element.classList.contains("off"));
  }

  function showMark(mark, x, y) {
    const point = data.points[mark.element.dataset.point];
    mark.element.classList.add("lit");
    tip.replaceChildren();
    line(tip, "strong", point.label);
    tip.append(table(point.rows));
    if (point.picture) {
      const picture = new Image();
      picture.src = point.picture;
      picture.alt = `pictures of ${point.label}`;
      tip.append(picture);
    }
    place(x, y);
  }

  function showRun(svg, run, vertex, event) {
    const curves = data.curves[svg.closest("figure").dataset.curves];
    const [steps, values] = curves[run.number];
    run.element.classList.add("lit");
    svg.classList.add("dim");
    tip.replaceChildren();
    line(tip, "strong", data.runs[run.number].name);
    tip.append(table([["method", data.runs[run.number].method], ["step", steps[vertex]], ["value", values[vertex]]]));
    place(event.clientX, event.clientY);
  }

  function look(svg, event) {
    hide();
    const matrix = svg.getScreenCTM();
    if (!matrix) return;
    const at = new DOMPoint(event.clientX, event.clientY).matrixTransform(matrix.inverse());
    let best = null;
    let least = near / matrix.a;
    const consider = (x, y, found) => {
      const distance = Math.hypot(x - at.x, y - at.y);
      if (distance < least) [least, best] = [distance, found];
    };
    for (const mark of marksOf(svg)) consider(mark.x, mark.y, () => showMark(mark, event.clientX, event.clientY));
    for (const run of runsOf(svg)) {
      run.vertices.forEach(([x, y], i) => consider(x, y, () => showRun(svg, run, i, event)));
    }
    best?.();
  }

  for (const svg of document.querySelectorAll(".plot svg")) {
    svg.addEventListener("pointermove", (event) => look(svg, event));
    svg.addEventListener("pointerdown", (event) => look(svg, event));
    svg.addEventListener("pointerleave", (event) => event.pointerType === "mouse" && hide());
  }
  for (const element of document.querySelectorAll(".mark")) {
    const point = data.points[element.dataset.point];
    element.setAttribute("tabindex", "0");
    element.setAttribute("role", "img");
    element.setAttribute("aria-label", [point.label, ...point.rows.map((row) => row.join(" "))].join("; "));
    element.closest("svg").setAttribute("role", "group"); // of an image, nothing inside would be told
    element.addEventListener("focus", () => {
      hide();
      element.scrollIntoView({ block: "nearest" });
      const box = element.getBoundingClientRect();
      showMark({ element }, box.x + box.width / 2, box.y + box.height / 2);
    });
    element.addEventListener("blur", hide);
  }
  addEventListener("scroll", () => document.activeElement?.closest(".mark") || hide(), { passive: true });
  addEventListener("keydown", (event) => event.key === "Escape" && hide());

  // Grids and tables

  for (const section of document.querySelectorAll(".grids")) {
    section.querySelector("select").addEventListener("change", (event) => {
      for (const block of section.querySelectorAll(".prompt")) block.hidden = block.dataset.prompt !== event.target.value;
    });
  }

  const key = (row, column) => {
    const cell = row.cells[column];
    return cell.dataset.value === undefined ? cell.textContent : +cell.dataset.value;
  };
  for (const table of document.querySelectorAll(".sortable")) {
    [...table.tHead.rows[0].cells].forEach((head, column) => {
      const button = document.createElement("button");
      button.textContent = head.textContent;
      head.replaceChildren(button);
      button.addEventListener("click", () => {
        const up = head.getAttribute("aria-sort") !== "ascending";
        for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
        head.setAttribute("aria-sort", up ? "ascending" : "descending");
        const rows = [...table.tBodies[0].rows].sort((a, b) => {
          const [x, y] = [key(a, column), key(b, column)];
          const order = typeof x === typeof y && typeof x === "number" ? x - y : String(x).localeCompare(String(y));
          return up ? order : -order;
        });
        table.tBodies[0].append(...rows);
      });
    });
  }
  apply();
})();
