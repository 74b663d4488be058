// Draws the figures that the page carries, in the colours of the reader's system, and in light ones on paper.
(() => {
  "use strict";
  const { plots, dark } = JSON.parse(document.getElementById("specs").textContent);
  const system = window.matchMedia("(prefers-color-scheme: dark)");
  const options = {
    displaylogo: false,
    displayModeBar: false,
    responsive: true,
    scrollZoom: false,
    doubleClick: false,
  };

  const paint = (value, colours) => {
    if (typeof value === "string") return Object.hasOwn(colours, value) ? colours[value] : value;
    if (Array.isArray(value)) return value.map((item) => paint(item, colours));
    if (value === null || typeof value !== "object") return value;
    return Object.fromEntries(Object.entries(value).map(([key, item]) => [key, paint(item, colours)]));
  };

  const draw = (isDark) => {
    for (const [id, figure] of Object.entries(plots)) {
      const { data, layout } = paint(figure, isDark ? dark : {});
      Plotly.react(document.getElementById(id), data, layout, options);
    }
  };

  draw(system.matches);
  system.addEventListener("change", (event) => draw(event.matches));
  window.addEventListener("beforeprint", () => draw(false));
  window.addEventListener("afterprint", () => draw(system.matches));
  document.documentElement.dataset.plots = "drawn";
})();
