const plots = [];
for (const figure of document.querySelectorAll("figure.chart")) {
  const { data, layout } = JSON.parse(figure.querySelector("script").textContent);
  if (matchMedia("(pointer: coarse)").matches) layout.dragmode = false; // a finger that scrolls the page must not zoom
  plots.push(figure.querySelector(".plot"));
  Plotly.newPlot(plots.at(-1), data, layout, { displayModeBar: false, responsive: true });
}
addEventListener("beforeprint", () => {
  document.querySelectorAll("details").forEach((folded) => (folded.open = true)); // paper cannot be unfolded
  plots.forEach((plot) => Plotly.relayout(plot, { width: 640 }));
});
addEventListener("afterprint", () => plots.forEach((plot) => Plotly.relayout(plot, { width: null, autosize: true })));
for (const slider of document.querySelectorAll("figure.slider:has(input)")) {
  const pictures = [...slider.querySelectorAll("img")];
  slider.querySelector("input").oninput = (event) => {
    pictures.forEach((picture, i) => (picture.hidden = i !== Number(event.target.value)));
    slider.querySelector("output").value = pictures[event.target.value].dataset.label;
  };
}
