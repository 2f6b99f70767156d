// Draws all lines of the report over tokens, FLOP or steps, as the reader selects; names of spans where there is room.
"use strict";
(() => {
  const controls = document.getElementById("along");
  if (!controls) return;
  const names = {tokens: "tokens seen", flop: "FLOP spent", step: "steps"}, {axes, along} = page.data;
  const figures = [...document.querySelectorAll(".figure > div")].filter(el => el.figure?.link === "run");
  const labelled = new Set(figures.filter(el => el.figure.layout.annotations.length));
  const label = document.createElement("label"), box = document.createElement("select");

  function fitting(annotations, el, [, end]) {  // those that do not run into the one before
    let used = -Infinity;
    return annotations.filter(({x, text}) => {
      const left = x / end * (el.clientWidth - 68);
      if (left < used) return false;
      used = left + 7 * (text.length + 1);
      return true;
    });
  }
  function draw(el, name) {
    const {layout, data} = el.figure, {xaxis, shapes, annotations} = along[name];
    const shown = labelled.has(el) ? fitting(annotations, el, xaxis.range) : [];
    const lines = data.map(trace => trace.axis ? {...trace, x: axes[trace.axis][name]} : trace);
    el.figure = {...el.figure, data: lines, layout: {...layout, xaxis, shapes, annotations: shown, uirevision: name}};
    page.draw(el);
  }
  for (const name of Object.keys(along)) box.add(new Option(names[name], name));
  box.addEventListener("change", () => figures.forEach(el => draw(el, box.value)));
  labelled.forEach(el => draw(el, "tokens"));
  label.append("Curves over", box);
  controls.append(label);
})();
