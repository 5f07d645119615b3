"use strict";
// The page is drawn without this script. It shows the values under a pointer, a finger or the arrow
// keys, hides lines from the legend, and shows the ranks of another mask. All words come as text.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const MOST_LINES = 12;

  const add = (parent, tag, text, name) => {
    const made = parent.appendChild(document.createElement(tag));
    if (text) made.textContent = text;
    if (name) made.className = name;
    return made;
  };

  // `at(x, y)`: the place under a point, both from 0 to 1. `left(place)`: where its cursor is.
  const follow = (area, { count, at, left, show, step = 1 }) => {
    const cursor = area.querySelector(".cursor"), tip = area.querySelector(".tip");
    let now = -1;
    const hide = () => { now = -1; cursor.hidden = tip.hidden = true; };
    const move = (place) => {
      if (place < 0 || place >= count) return;
      now = place;
      const x = left(place);
      cursor.style.left = `${100 * x}%`;
      tip.replaceChildren();
      show(place, tip);
      tip.style.left = x < 0.5 ? `calc(${100 * x}% + 12px)` : "auto";
      tip.style.right = x < 0.5 ? "auto" : `calc(${100 * (1 - x)}% + 12px)`;
      cursor.hidden = tip.hidden = false;
    };
    const pointed = (event) => {
      const box = area.getBoundingClientRect();
      const part = (value) => Math.min(Math.max(value, 0), 0.999999);
      move(at(part((event.clientX - box.left) / box.width), part((event.clientY - box.top) / box.height)));
    };
    area.addEventListener("pointerdown", pointed);
    area.addEventListener("pointermove", pointed);
    area.addEventListener("pointerleave", (event) => { if (event.pointerType === "mouse") hide(); });
    area.addEventListener("blur", hide);
    area.addEventListener("keydown", (event) => {
      const last = count - 1;
      const to = {
        ArrowLeft: Math.max(now < 0 ? last : now - 1, 0),
        ArrowRight: Math.min(now + 1, last),
        ArrowUp: Math.max(now - step, 0),
        ArrowDown: Math.min(now + step, last),
        Home: 0,
        End: last,
      }[event.key];
      if (event.key === "Escape") return hide();
      if (to === undefined) return;
      event.preventDefault();
      move(to);
    });
  };

  const nearest = (places, x) => {
    let best = 0;
    places.forEach((place, i) => { if (Math.abs(place - x) < Math.abs(places[best] - x)) best = i; });
    return best;
  };

  for (const figure of document.querySelectorAll(".chart")) {
    const chart = data.charts[figure.dataset.chart];
    const drawn = figure.querySelectorAll(".line"), off = new Set();
    for (const button of figure.querySelectorAll(".legend button")) {
      button.addEventListener("click", () => {
        const line = Number(button.dataset.line), isOn = off.delete(line);
        if (!isOn) off.add(line);
        button.setAttribute("aria-pressed", String(isOn));
        drawn[line].classList.toggle("off", !isOn);
      });
    }
    follow(figure.querySelector(".area"), {
      count: chart.x.length,
      at: (x) => nearest(chart.x, x * data.width),
      left: (place) => chart.x[place] / data.width,
      show: (place, tip) => {
        add(tip, "b", `step ${chart.steps[place]}`);
        const there = chart.lines.filter((line, i) => line.text[place] && !off.has(i));
        there.sort((a, b) => a.y[place] - b.y[place]);
        for (const line of there.slice(0, MOST_LINES)) {
          const row = add(tip, "div");
          add(row, "i", "", `c${line.colour}${line.dash ? " dashed" : ""}`);
          add(row, "span", chart.lines.length > 1 ? `${line.label}: ${line.text[place]}` : line.text[place]);
        }
        if (there.length > MOST_LINES) add(tip, "div", `and ${there.length - MOST_LINES} more`);
        if (chart.notes[place]) add(tip, "div", chart.notes[place]);
      },
    });
  }

  for (const figure of document.querySelectorAll(".bands")) {
    const [run, which] = figure.dataset.bands.split(".");
    const bands = data.ranks[run].bands[which];
    const wide = bands.steps.length, high = bands.rows.length;
    follow(figure.querySelector(".area"), {
      count: wide * high,
      at: (x, y) => Math.floor(y * high) * wide + Math.floor(x * wide),
      left: (place) => ((place % wide) + 0.5) / wide,
      step: wide,
      show: (place, tip) => {
        const row = Math.floor(place / wide), column = place % wide;
        add(tip, "b", bands.rows[row]);
        add(tip, "div", `step ${bands.steps[column]}: ${bands.text[row][column] || "–"}`);
      },
    });
  }

  for (const part of document.querySelectorAll(".ranks")) {
    const grid = data.ranks[part.dataset.ranks].grid;
    const slider = part.querySelector("input"), output = part.querySelector("output");
    const cells = part.querySelectorAll(".heat tbody td");
    slider.hidden = false;
    slider.addEventListener("input", () => {
      const mask = Number(slider.value);
      output.textContent = grid.captions[mask];
      slider.setAttribute("aria-valuetext", grid.captions[mask]);
      grid.ranks[mask].forEach((rank, i) => {
        if (!cells[i]) return;
        const shade = rank <= 0 ? 0 : Math.max(1, Math.min(grid.levels, Math.round((grid.levels * rank) / grid.top)));
        cells[i].textContent = rank < 0 ? "" : String(rank);
        cells[i].className = rank < 0 ? "" : `s${shade}`;
      });
    });
  }
})();
