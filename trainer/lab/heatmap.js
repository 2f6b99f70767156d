// Draws the layer x expert x step heatmap from the loads in page.data, for the arm and layer that the reader selects.
"use strict";
(() => {
  const el = document.getElementById("heatmap"), controls = document.getElementById("controls");
  if (!el) return;
  const runs = page.data.runs.filter(run => run.loads), numLayers = Math.max(...runs.map(run => run.loads.layers));
  const MAX_PANELS = 12, STARVED = Math.log2(0.1), BOTTOM = STARVED - 0.5, shift = page.data.config.shift_step;
  const range = n => [...Array(n).keys()];

  function select(label, options, chosen) {  // options: [value, text]
    const box = document.createElement("select"), frame = document.createElement("label");
    for (const [value, text] of options) box.add(new Option(text, value));
    box.value = chosen;
    box.addEventListener("change", show);
    frame.append(label, box);
    controls.append(frame);
    return box;
  }
  const all = "all", several = n => n > 1 && n <= MAX_PANELS ? [[all, "all"]] : [];
  const arm = select(page.data.noun ?? "Arm", [...several(runs.length), ...runs.map((run, i) => [i, run.arm])], runs.length > 1 && runs.length <= MAX_PANELS ? all : 0);
  const layer = select("Layer", [...several(numLayers), ...range(numLayers).map(m => [m, m])], runs.length === 1 && numLayers > 1 && numLayers <= 4 ? all : 0);
  const sorted = select("Experts sorted by", [["start", "load at the start"], ["end", "load at the end"], ["index", "index"]], "start");
  const left_out = document.createElement("span");
  controls.append(left_out);

  function bytes(run) {
    return run.bytes ??= Uint8Array.from(atob(run.loads.data), character => character.charCodeAt(0));
  }
  function edges(steps, bins) {  // of the time bins; the curves may have more of them
    return steps.length === bins ? [0, ...steps] : range(bins + 1).map(i => i / bins * steps.at(-1));
  }
  function panel(run, m) {  // rows from the bottom up: the least loaded first, or index 0 last
    const {experts, bins, max} = run.loads, data = bytes(run), few = Math.max(1, Math.round(bins / 50));
    const row = e => data.subarray((m * experts + e) * bins, (m * experts + e + 1) * bins);
    const mean = e => {
      const part = sorted.value === "end" ? row(e).subarray(-Math.ceil(bins / 10)) : row(e).subarray(0, few);
      return part.reduce((sum, x) => sum + x, 0);
    };
    const key = range(experts).map(e => sorted.value === "index" ? -e : mean(e));
    const order = range(experts).sort((a, b) => key[a] - key[b] || b - a);
    const loads = order.map(e => Array.from(row(e), x => x / 255 * max));
    return {
      type: "heatmap", coloraxis: "coloraxis", x: edges(run.steps, bins), y: order.map(e => `expert ${e}`), customdata: loads,
      z: loads.map(of => Float32Array.from(of, load => load < 0.1 ? (STARVED + BOTTOM) / 2 : Math.log2(load))),
      hovertemplate: "%{y}, step %{x:.0f}<br>load %{customdata:.2f} even shares<extra></extra>",
    };
  }
  function coloraxis(max) {
    const at = log2 => Math.min(1, Math.max(0, (log2 - BOTTOM) / (Math.log2(max) - BOTTOM)));
    const ticks = [-2, -1, 0, ...range(10).map(i => i + 1).filter(i => 2 ** i < max * 0.9)];
    return {
      cmin: BOTTOM, cmax: Math.log2(max),
      colorscale: [
        [0, "var(--starved)"], [at(STARVED), "var(--starved)"], [at(STARVED), "var(--under3)"], [at(-1.3), "var(--under2)"], [at(-0.5), "var(--under1)"],
        [at(0), "var(--even)"], [at(0.5), "var(--over1)"], [at(1), "var(--over2)"], [1, "var(--over3)"],
      ],
      colorbar: {
        orientation: "h", x: 0.5, y: 1, yref: "container", yanchor: "top", thickness: 12, len: 0.9, outlinewidth: 0,
        title: {text: "load, even shares", side: "top"}, tickvals: [(STARVED + BOTTOM) / 2, ...ticks, Math.log2(max)],
        ticktext: ["starved", ...ticks.map(t => `${2 ** t}`), `≥ ${+max.toPrecision(2)}`],
      },
    };
  }
  function show() {
    const chosen = (arm.value === all ? runs : [runs[arm.value]]).flatMap(run =>
      (layer.value === all ? range(run.loads.layers) : [+layer.value]).filter(m => m < run.loads.layers).map(m => [run, m]));
    const panels = chosen.slice(0, MAX_PANELS), n = panels.length;
    left_out.textContent = n < chosen.length ? `${n} of ${chosen.length} are shown; select an arm or a layer for the others` : "";
    const inner = n === 1 ? 400 : n === 2 ? 240 : n <= 4 ? 170 : 120, gap = 34, top = 60, bottom = 44;
    const body = n * (inner + gap), height = top + body + bottom, text = word => String(word).replace(/&/g, "&amp;").replace(/</g, "&lt;");
    const layout = {
      height, margin: {l: 14, r: 20, t: top, b: bottom}, coloraxis: coloraxis(Math.max(...panels.map(([run]) => run.loads.max))),
      hovermode: "closest", annotations: [], shapes: [], xaxis: {},
    };
    const data = panels.map(([run, m], i) => {
      const suffix = i ? i + 1 : "", high = 1 - (i * (inner + gap) + gap) / body, low = 1 - (i + 1) * (inner + gap) / body;
      layout[`xaxis${suffix}`] = {
        anchor: `y${suffix}`, showticklabels: i === n - 1,
        ...(i ? {matches: "x"} : {}), ...(i === n - 1 ? {title: {text: "step"}} : {}),
      };
      layout[`yaxis${suffix}`] = {anchor: `x${suffix}`, domain: [Math.max(0, low), high], type: "category", showticklabels: false, showgrid: false, automargin: false};
      layout.annotations.push({
        text: `<b>${text(run.arm)}</b>  layer ${m}, ${run.loads.experts} experts`, showarrow: false, xref: "paper", yref: "paper",
        x: 0, y: high, xanchor: "left", yanchor: "bottom", font: {color: "var(--ink)"},
      });
      if (shift != null) layout.shapes.push({type: "line", xref: `x${suffix}`, yref: `y${suffix} domain`, x0: shift, x1: shift, y0: 0, y1: 1, line: {color: "var(--ink)", width: 1, dash: "dot"}});
      return {...panel(run, m), xaxis: `x${suffix}`, yaxis: `y${suffix}`};
    });
    el.style.height = `${height}px`;
    el.figure = {...el.figure, data, layout};
    page.draw(el);
  }
  show();
})();
