"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  if (!data.length) return;

  // Elements

  function make(name, properties = {}, ...children) {
    const element = document.createElement(name);
    for (const [key, value] of Object.entries(properties)) {
      if (key in element && key !== "list") element[key] = value;
      else element.setAttribute(key, value);
    }
    element.append(...children);
    return element;
  }

  function draw(name, attributes, ...children) {
    const element = document.createElementNS("http://www.w3.org/2000/svg", name);
    for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
    element.append(...children);
    return element;
  }

  function choice(label, names, chosen, onChoose) {
    const select = make("select", {}, ...names.map((name, index) => make("option", { value: index }, name)));
    select.value = chosen;
    select.addEventListener("change", () => onChoose(Number(select.value)));
    return make("label", {}, make("span", {}, label), select);
  }

  function toggles(label, names, isOn, onToggle, style = () => "") {
    const set = make("fieldset", {}, make("legend", {}, label));
    names.forEach((name, index) => {
      const button = make("button", { type: "button", className: style(index) ? "head" : "" }, name);
      button.setAttribute("aria-pressed", isOn(index));
      if (style(index)) button.style.borderColor = style(index);
      button.addEventListener("click", () => onToggle(index));
      set.append(button);
    });
    return set;
  }

  // Redraw a view, and keep the keyboard focus on the control that was used
  function replaceContent(root, children) {
    const controls = [...root.querySelectorAll("select, button")];
    const used = controls.indexOf(document.activeElement);
    root.replaceChildren(...children);
    if (used >= 0) root.querySelectorAll("select, button")[used]?.focus();
  }

  // Numbers

  function bytes(text) {
    const decoded = atob(text);
    return Uint8Array.from(decoded, character => character.charCodeAt(0));
  }

  const decoded = new WeakMap();

  // weight(head, query, key) of a layer
  function weightsOf(layer, tokens) {
    if (!decoded.has(layer)) decoded.set(layer, bytes(layer.data));
    const values = decoded.get(layer), size = tokens * (tokens + 1) / 2;
    return (head, query, key) => key > query ? 0 : (values[head * size + query * (query + 1) / 2 + key] / 255) ** 2;
  }

  // value(kv, token, dimension) of the keys of a layer
  function keysOf(layer, tokens) {
    if (!decoded.has(layer)) decoded.set(layer, new DataView(bytes(layer.data).buffer));
    const values = decoded.get(layer);
    return (kv, token, dim) => layer.scale * values.getInt16(2 * ((kv * tokens + token) * layer.dim + dim), true);
  }

  const color = index => `hsl(${(index * 137.5 + 212) % 360} 58% 48%)`;
  const quoted = token => `“${token}”`;

  // A canvas with a pixel for each cell, which is read with the pointer or with the arrow keys
  function cells(rows, columns, pixel, describe, readout, label) {
    const canvas = make("canvas", { width: columns, height: rows, tabIndex: 0, role: "img", "aria-label": label });
    const context = canvas.getContext("2d"), image = context.createImageData(columns, rows);
    for (let row = 0; row < rows; row++) {
      for (let column = 0; column < columns; column++) image.data.set(pixel(row, column), 4 * (row * columns + column));
    }
    context.putImageData(image, 0, 0);
    const cursor = make("div", { className: "cursor", hidden: true });
    const place = [0, 0];
    function show(row, column) {
      place[0] = Math.min(Math.max(row, 0), rows - 1);
      place[1] = Math.min(Math.max(column, 0), columns - 1);
      Object.assign(cursor.style, {
        left: `${100 * place[1] / columns}%`, top: `${100 * place[0] / rows}%`,
        width: `${100 / columns}%`, height: `${100 / rows}%`,
      });
      cursor.hidden = false;
      readout.textContent = describe(place[0], place[1]);
    }
    canvas.addEventListener("pointermove", event => {
      const box = canvas.getBoundingClientRect();
      show(Math.floor((event.clientY - box.top) / box.height * rows), Math.floor((event.clientX - box.left) / box.width * columns));
    });
    canvas.addEventListener("pointerleave", () => { cursor.hidden = true; });
    canvas.addEventListener("focus", () => { if (canvas.matches(":focus-visible")) show(...place); });
    canvas.addEventListener("blur", () => { cursor.hidden = true; });
    canvas.addEventListener("keydown", event => {
      const step = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
      if (!step) return;
      event.preventDefault();
      show(place[0] + step[0], place[1] + step[1]);
    });
    return make("div", { className: "cells" }, canvas, cursor);
  }

  // Attention weights

  function attentionView(root) {
    const state = { model: 0, layer: 0, view: 0, heads: new Set(), query: null };

    function resetHeads() {
      const layer = data[state.model].weights.layers?.[state.layer];
      const count = layer?.heads ?? 0;
      if (![...state.heads].some(head => head < count)) {
        state.heads = new Set(Array.from({ length: Math.min(count, 12) }, (_, head) => head));
      }
    }

    function set(change) {
      Object.assign(state, change);
      render();
    }

    function render() {
      const found = data[state.model].weights;
      if (!found.error && !found.layers.length) found.error = "the model has no attention";
      const models = data.length > 1 ? [choice("Model", data.map(one => one.name), state.model, model => set({ model, layer: 0 }))] : [];
      if (found.error) {
        replaceContent(root, [make("div", { className: "controls" }, ...models), make("p", { className: "note" }, `Not shown: ${found.error}`)]);
        return;
      }
      resetHeads();
      const layer = found.layers[state.layer];
      const controls = make("div", { className: "controls" }, ...models,
        choice("Layer", found.layers.map((_, index) => String(index)), state.layer, chosen => set({ layer: chosen })),
        toggles("View", ["lines", "matrix"], index => index === state.view, view => set({ view })));
      if (layer.error) {
        replaceContent(root, [controls, make("p", { className: "note" }, `Not shown: ${layer.error}`)]);
        return;
      }
      const all = Array.from({ length: layer.heads }, (_, head) => head);
      controls.append(
        toggles("Heads", all.map(String), head => state.heads.has(head), head => {
          const heads = new Set(state.heads);
          if (!heads.delete(head)) heads.add(head);
          if (heads.size) set({ heads });
        }, color),
        make("button", { type: "button", onclick: () => set({ heads: new Set(all) }) }, "all heads"));
      const readout = make("p", { className: "readout", "aria-live": "polite" });
      const heads = all.filter(head => state.heads.has(head));
      const weight = weightsOf(layer, found.tokens.length);
      const picture = state.view === 0 ? lines(found.tokens, heads, weight, readout) : matrices(found.tokens, heads, weight, readout);
      replaceContent(root, [controls, picture, readout,
        make("p", { className: "note" }, "Weights are rounded by less than 0.004. Weights on learned rows, such as attention sinks, are not shown.")]);
    }

    function lines(tokens, heads, weight, readout) {
      const row = 24, height = tokens.length * row;
      const column = 24 + 8.6 * Math.max(...tokens.map(token => shortened(token).length), 4), width = 2 * column + 220;
      const svg = draw("svg", { class: "lines", style: `max-width: ${1.3 * width}px`, viewBox: `0 0 ${width} ${height}`, role: "group", "aria-label": "attention weights, queries left, keys right" });
      const middle = index => index * row + row / 2;
      const links = draw("g", {}), bars = draw("g", {});
      svg.append(bars, links);

      function show(query) {
        const shown = query === null ? tokens.keys() : [query];
        links.replaceChildren();
        bars.replaceChildren();
        for (const from of shown) {
          for (let to = 0; to <= from; to++) {
            for (const [index, head] of heads.entries()) {
              const value = weight(head, from, to);
              if (value < 0.01) continue;
              const shift = ((index + 0.5) / heads.length - 0.5) * (row - 8);  // heads side by side
              links.append(draw("line", {
                x1: column, y1: middle(from) + shift, x2: width - column, y2: middle(to) + shift,
                stroke: color(head), "stroke-opacity": (query === null ? 0.75 : 0.95) * value, "stroke-width": query === null ? 1.2 : 2,
              }));
            }
          }
        }
        svg.querySelectorAll(".query").forEach((token, index) => token.classList.toggle("chosen", index === query));
        if (query === null) {
          readout.textContent = "";
          return;
        }
        const step = (column - 4) / heads.length;
        for (let to = 0; to <= query; to++) {
          heads.forEach((head, index) => bars.append(draw("rect", {
            x: width - column + 4 + index * step, y: to * row + 1, width: step, height: row - 2, fill: color(head), "fill-opacity": 0.8 * weight(head, query, to),
          })));
        }
        const mean = Array.from({ length: query + 1 }, (_, to) => heads.reduce((sum, head) => sum + weight(head, query, to), 0) / heads.length);
        const largest = [...mean.keys()].sort((a, b) => mean[b] - mean[a]).slice(0, 4);
        readout.textContent = `Query ${quoted(tokens[query])}, mean of ${heads.length} head${heads.length > 1 ? "s" : ""}: `
          + largest.map(to => `${quoted(tokens[to])} ${mean[to].toFixed(2)}`).join(", ");
      }

      tokens.forEach((token, index) => {
        const query = draw("g", { class: "token query", tabindex: 0, role: "button", "aria-label": `query ${token}` },
          draw("rect", { x: 0, y: index * row, width: column - 4, height: row }),
          Object.assign(draw("text", { x: column - 12, y: middle(index) + 5, "text-anchor": "end" })));
        query.lastChild.textContent = shortened(token);
        query.addEventListener("pointerenter", () => show(index));
        query.addEventListener("pointerleave", () => show(state.query));
        query.addEventListener("focus", () => show(index));
        query.addEventListener("blur", () => show(state.query));
        const pin = () => { state.query = state.query === index ? null : index; show(state.query); };
        query.addEventListener("click", pin);
        query.addEventListener("keydown", event => {
          const move = { ArrowUp: -1, ArrowDown: 1 }[event.key];
          if (event.key === "Enter" || event.key === " ") { event.preventDefault(); pin(); }
          if (move) { event.preventDefault(); svg.querySelectorAll(".query")[index + move]?.focus(); }
        });
        const key = draw("text", { x: width - column + 12, y: middle(index) + 5 });
        key.textContent = shortened(token);
        svg.append(query, key);
      });
      if (state.query !== null && state.query >= tokens.length) state.query = null;
      show(state.query);
      return svg;
    }

    function matrices(tokens, heads, weight, readout) {
      const rgb = getComputedStyle(document.documentElement).getPropertyValue("--accent-rgb").split(",").map(Number);
      const few = heads.length < 3;
      const labels = className => make("div", { className, "aria-hidden": true }, ...tokens.map(token => make("span", {}, shortened(token))));
      return make("div", { className: few ? "matrices few" : "matrices" }, ...heads.map(head => {
        const matrix = cells(tokens.length, tokens.length,
          (query, key) => [...rgb, 255 * Math.sqrt(weight(head, query, key))],
          (query, key) => key > query
            ? `Head ${head}: query ${quoted(tokens[query])} does not attend to the later key ${quoted(tokens[key])}`
            : `Head ${head}: query ${quoted(tokens[query])}, key ${quoted(tokens[key])}: ${weight(head, query, key).toFixed(3)}`,
          readout, `attention weights of head ${head}, a row for each query`);
        matrix.style.borderColor = color(head);
        return make("figure", {},
          few ? make("div", { className: "labeled" }, labels("labels across"), labels("labels"), matrix) : matrix,
          make("figcaption", {}, `head ${head}`));
      }));
    }

    const shortened = token => token.length > 20 ? `${token.slice(0, 19)}…` : token;
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", render);
    render();
  }

  // Keys

  const FIRST_DIMENSIONS = 20, MOST_COLUMNS = 8;

  function keysView(root) {
    const state = { layer: 0, allTokens: false, allDimensions: false };

    function set(change) {
      Object.assign(state, change);
      render();
    }

    function render() {
      const shown = data.filter(one => !one.keys.error);
      const readout = make("p", { className: "readout", "aria-live": "polite" });
      const layers = Math.max(0, ...shown.map(one => one.keys.layers.length));
      const children = [];
      if (layers) {
        children.push(make("div", { className: "controls" },
          choice("Layer", Array.from({ length: layers }, (_, index) => String(index)), state.layer, layer => set({ layer })),
          toggles("Tokens", ["first", "all"], index => state.allTokens === Boolean(index), index => set({ allTokens: Boolean(index) })),
          toggles("Dimensions", [`first ${FIRST_DIMENSIONS}`, "all"], index => state.allDimensions === Boolean(index), index => set({ allDimensions: Boolean(index) }))));
      }
      const limit = Math.max(...shown.map(one => one.keys.layers[state.layer]?.limit ?? 0));
      const scale = make("p", { className: "note" }, `−${limit.toPrecision(2)}`, make("span", { className: "scale" }), `${limit.toPrecision(2)}`);
      const rows = rowsOf(shown.map(one => one.keys.layers[state.layer]?.reads).filter(Boolean));
      children.push(make("div", { className: "models" }, ...data.map(one => model(one, rows, limit, readout))), ...limit ? [scale] : [], readout);
      replaceContent(root, children);
    }

    // The query heads of each row, for all models alike: the smallest groups that share a KV head
    function rowsOf(reads) {
      const groups = reads.map(heads => Object.values(Object.groupBy(heads.keys(), head => heads[head])));
      const shared = groups.filter(rows => rows.some(row => row.length > 1));
      return shared.sort((one, other) => other.length - one.length)[0] ?? chunks((groups[0] ?? []).flat());
    }

    function model(one, rows, limit, readout) {
      const found = one.keys, layer = found.layers?.[state.layer];
      const title = data.length > 1 ? [make("h3", {}, one.name)] : [];
      const error = found.error ?? (layer ? layer.error : "the model has no such layer");
      if (error) return make("div", {}, ...title, make("p", { className: "note" }, `Not shown: ${error}`));
      return make("div", {}, ...title, groups(found, layer, rows, limit, readout));
    }

    function groups(found, layer, rows, limit, readout) {
      const value = keysOf(layer, found.tokens.length);
      const tokens = state.allTokens ? found.tokens.length : 1;
      const dimensions = state.allDimensions ? layer.dim : Math.min(FIRST_DIMENSIONS, layer.dim);
      const columns = balanced(Math.max(...rows.map(row => row.length)));
      return make("div", { className: "groups" }, ...rows.map(row => {
        const [first, last] = [layer.reads[row[0]], layer.reads[row.at(-1)]];
        const title = make("h4", {}, first === last ? `KV head ${first}` : `KV heads ${first}-${last}`);
        const group = make("div", { className: "group" }, title, ...row.map(head => {
          const read = layer.reads[head];
          const cell = cells(tokens, dimensions,
            (token, dim) => shade(value(read, token, dim) / limit),
            (token, dim) => `Query head ${head} reads KV head ${read}; token ${quoted(found.tokens[token])}, dimension ${dim}: ${value(read, token, dim).toPrecision(4)}`,
            readout, `keys that query head ${head} reads`);
          cell.style.borderColor = color(read);
          cell.firstChild.style.height = `${Math.max(28, 12 * tokens)}px`;
          return make("figure", {}, make("figcaption", {}, `query ${head}`), cell);
        }));
        group.style.setProperty("--columns", columns);
        return group;
      }));
    }

    // As many columns as fill all rows alike
    const balanced = count => Math.ceil(count / Math.ceil(count / MOST_COLUMNS));
    function chunks(list) {
      const size = balanced(list.length);
      return Array.from({ length: Math.ceil(list.length / size) }, (_, row) => list.slice(row * size, (row + 1) * size));
    }
    const shade = value => [...value < 0 ? [33, 102, 172] : [190, 40, 50], 255 * Math.min(1, Math.abs(value))];
    render();
  }

  attentionView(document.getElementById("attention-view"));
  keysView(document.getElementById("keys-view"));
  addEventListener("beforeprint", () => document.querySelectorAll("details").forEach(one => { one.open = true; }));
})();
