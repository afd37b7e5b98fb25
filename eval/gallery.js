// Cards, so many at a time, of rows that have a prompt. A page's own script has PER_PAGE, card(), draw() and `state`, of which
// filter and page are here.
function figure(label, image, won, large) {  // image: {thumb, full, score}, or null
  const node = element("figure");
  if (won) node.className = "won";
  if (image?.thumb) {
    const picture = element("img", {alt: label, loading: large ? "eager" : "lazy", decoding: "async"});
    if (large) picture.addEventListener("error", () => { picture.src = image.thumb; }, {once: true});
    picture.src = large ? image.full : image.thumb;
    node.append(picture);
  } else node.append(element("div", {class: "gone"}, image ? "image is gone" : "no image"));
  node.append(element("figcaption", {}, element("span", {}, (won ? "\u2605 " : "") + label), image ? image.score.toFixed(4) : ""));
  return node;
}
function matching(rows) {  // whose prompt has every word of the filter
  const words = state.filter.toLowerCase().split(/\s+/).filter(Boolean);
  return rows.filter(row => words.every(word => row.prompt.toLowerCase().includes(word)));
}
function drawPage(shown, total, none, unit = "") {
  const pages = Math.max(1, Math.ceil(shown.length / PER_PAGE));
  state.page = Math.min(state.page, pages - 1);
  const here = shown.slice(state.page * PER_PAGE, (state.page + 1) * PER_PAGE);
  byId("gallery").replaceChildren(...(here.length ? here.map(card) : [element("p", {class: "none soft"}, none)]));
  byId("count").textContent = `${shown.length.toLocaleString("en")} of ${total.toLocaleString("en")}${unit}`;
  byId("page").textContent = `${state.page + 1} / ${pages}`;
  byId("previous").disabled = state.page === 0;
  byId("next").disabled = state.page === pages - 1;
}
function control(choices) {  // fills each select of {id: {value: [text, ...]}}, and listens to all
  for (const [id, values] of Object.entries(choices)) {
    for (const [value, [text]] of Object.entries(values)) byId(id).append(element("option", {value}, text));
    byId(id).onchange = event => { state[id] = event.target.value; state.page = 0; draw(); };
  }
  const turn = by => { state.page += by; draw(); byId("gallery").parentElement.scrollIntoView(); };
  byId("filter").oninput = event => { state.filter = event.target.value; state.page = 0; draw(); };
  byId("previous").onclick = () => turn(-1);
  byId("next").onclick = () => turn(1);
}
