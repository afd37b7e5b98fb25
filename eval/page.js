"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const byId = id => document.getElementById(id);

// Small images that are shown larger keep their pixels' edges.
document.addEventListener("load", ({target: image}) => {
  if (image.tagName !== "IMG") return;
  const shown = image.clientWidth * devicePixelRatio;
  image.classList.toggle("crisp", Math.max(image.naturalWidth, image.naturalHeight) < 256 && shown > image.naturalWidth);
}, true);
// Prompts are others' text: they only ever become text nodes.
function element(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}
