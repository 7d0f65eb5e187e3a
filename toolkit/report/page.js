"use strict";
// What is printed and read without script are the SVGs that are here already; this puts charts that answer over them.
(() => {
  const figures = [...document.querySelectorAll("figure[data-chart]")];

  function specification(figure, log) {
    // each plot gets the width that is left beside its axes; an axis that may be logarithmic says that it is linear
    let text = figure.querySelector("script").textContent;
    if (log) text = text.replaceAll('"type": "linear", "zero": false', '"type": "log"');
    const spec = JSON.parse(text);
    const drawn = figure.querySelector(".static svg");
    const plots = spec.vconcat || [spec];
    const beside = drawn.viewBox.baseVal.width - plots[0].width;
    if (!("fixed" in figure.dataset)) for (const plot of plots) plot.width = Math.max(160, figure.clientWidth - beside);
    return spec;
  }

  async function draw(figure) {
    const log = figure.querySelector(".tools button")?.getAttribute("aria-pressed") === "true";
    const place = document.createElement("div");
    place.className = "live";
    const options = { actions: false, defaultStyle: false, renderer: "svg", tooltip: { disableDefaultStyle: true, offsetX: 12, offsetY: 12 } };
    const { view } = await vegaEmbed(place, specification(figure, log), options);
    figure.view?.finalize();
    figure.view = view;
    figure.querySelector(":scope > .live")?.remove();
    figure.querySelector(".static").after(place);
    figure.drawnAt = figure.clientWidth;
    figure.classList.add("drawn");
  }

  function equip(figure) {
    if (!figure.querySelector("script").textContent.includes('"type": "linear"')) return;
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = "logarithmic";
    button.setAttribute("aria-pressed", "false");
    button.addEventListener("click", () => {
      button.setAttribute("aria-pressed", String(button.getAttribute("aria-pressed") !== "true"));
      draw(figure);
    });
    const tools = document.createElement("div");
    tools.className = "tools";
    tools.append(button);
    figure.prepend(tools);
  }

  function begin() {
    const library = document.createElement("script");
    library.textContent = document.getElementById("library").textContent;
    document.head.append(library);
    const seen = new IntersectionObserver((entries) => {
      for (const { isIntersecting, target } of entries) {
        if (!isIntersecting) continue;
        seen.unobserve(target);
        equip(target);
        draw(target);
      }
    }, { rootMargin: "600px" });
    figures.forEach((figure) => seen.observe(figure));
    let waiting;
    addEventListener("resize", () => {
      clearTimeout(waiting);
      waiting = setTimeout(() => {
        for (const figure of figures) if (figure.view && figure.clientWidth !== figure.drawnAt) draw(figure);
      }, 150);
    });
  }

  requestAnimationFrame(() => setTimeout(begin)); // after the first paint
})();
