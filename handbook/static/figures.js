// Figures that can be turned: pages that have one load the shared plotly.js, and draw a figure when it comes into view.
const script = document.currentScript.src;
document.addEventListener("DOMContentLoaded", () => {
  const places = document.querySelectorAll(".plotly-figure");
  if (!places.length) return;
  const library = document.createElement("script");
  library.src = new URL("plotly.min.js", script).href;
  library.onload = () => {
    const watcher = new IntersectionObserver(entries => entries.filter(e => e.isIntersecting).forEach(({target}) => {
      watcher.unobserve(target);
      const figure = JSON.parse(target.querySelector("script").textContent);
      target.querySelector("p").remove();
      Plotly.newPlot(target, figure.data, {...figure.layout, autosize: true, width: undefined}, {responsive: true, displaylogo: false});
    }), {rootMargin: "200px"});
    places.forEach(place => watcher.observe(place));
  };
  document.head.append(library);
});
