// The page of sasa-demo. Pixels are (row, column) in the image as the model sees it, which the server sends back.
"use strict";

const at = id => document.getElementById(id);
const COLOURS = ["#00224e", "#123570", "#3b496c", "#575d6d", "#707173", "#8a8678", "#a59c74", "#c3b369", "#e1cc55",
  "#fee838"].map(text => [1, 3, 5].map(start => parseInt(text.slice(start, start + 2), 16)));  // matplotlib's cividis
const SIDE = 352;  // width of a drawn picture in pixels
const SMALL_WINDOW = 0.2;  // of the image's width; smaller ones are also shown enlarged
let about, file, answer, picture, chosen, asked = 0;

function say(text, isWrong = false) {
  at("said").textContent = text;
  at("said").className = isWrong ? "wrong" : "";
}

async function fetched(path, options) {
  let response;
  try {
    response = await fetch(path, options);
  } catch {
    throw new Error("no answer; is sasa-demo still running?");
  }
  const found = await response.json();
  if (!response.ok) throw new Error(found.error);
  return found;
}

// Show a file and, where its chosen pixel is given, that pixel's attention.
async function look(from, pixel) {
  const mine = ++asked;
  say(pixel ? "" : `reading ${from.name} ...`);
  try {
    const [size, most] = [from.size, about.max_bytes].map(bytes => Math.ceil(bytes / 2 ** 20));
    if (from.size > about.max_bytes) throw new Error(`has ${size} MiB; at most ${most} MiB are taken`);
    const query = pixel ? `?row=${pixel[0]}&column=${pixel[1]}` : "";
    const found = await fetched(`look${query}`, { method: "POST", body: from });
    const shown = new Image();
    shown.src = found.image;
    await shown.decode();
    if (mine !== asked) return;  // a later question was asked
    [file, answer, picture] = [from, found, shown];
    say(from.name);
    show();
  } catch (error) {
    if (mine === asked) say(`${from.name}: ${error.message}`, true);
  }
}

function show() {
  at("shown").hidden = false;
  at("classes").replaceChildren(...answer.classes.map(([name, share]) => {
    const line = document.createElement("li"), bar = document.createElement("div");
    bar.className = "bar";
    bar.append(document.createElement("div"));
    bar.firstChild.style.width = `${100 * share}%`;
    line.append(spanOf(name), bar, spanOf(`${(100 * share).toFixed(2)} %`));
    return line;
  }));
  const context = begin(at("picture"));
  drawPicture(context);
  at("pixel").textContent = `As the model sees it, ${about.height} x ${about.width} pixels.`;
  if (!answer.layers.length) return;
  const [row, column] = answer.pixel;
  dot(context, pixelBox(), box => box.map(n => n * SIDE / about.width), 7);
  at("pixel").textContent += ` Pixel ${row},${column} is chosen; click another one.`;
  at("attention").hidden = false;
  chosen = answer.layers.some(layer => layer.name === chosen) ? chosen : answer.layers.at(-1).name;
  at("layers").replaceChildren(...answer.layers.map(layer => tile(layer, meanOf(layer.heads), layer.name, true)));
  showHeads();
}

function showHeads() {
  const layer = answer.layers.find(one => one.name === chosen);
  const largest = Math.max(...layer.heads.flat(2));
  at("layer").textContent = `Heads of ${layer.name}, ${layer.reduction} px per position`;
  at("heads").replaceChildren(...layer.heads.map((head, n) => tile(layer, head, `head ${n}`, false, largest)));
  for (const button of at("layers").children) button.setAttribute("aria-pressed", button.dataset.layer === chosen);
}

// One map of weights [h, w] over the grey picture; `largest` is the weight that is drawn brightest.
function tile(layer, weights, title, isButton, largest = Math.max(...weights.flat())) {
  const box = document.createElement(isButton ? "button" : "div"), canvas = document.createElement("canvas");
  const flat = weights.flat(), outside = 1 - flat.reduce((a, b) => a + b, 0);
  box.className = "tile";
  drawWeights(begin(canvas), layer, weights, largest);
  const most = `max ${Math.max(...flat).toFixed(3)}`;
  box.append(canvas, spanOf(title), spanOf(outside > 0.005 ? `${most}, ${Math.round(100 * outside)} % outside` : most));
  if (isButton) {
    box.dataset.layer = layer.name;
    box.onclick = () => { chosen = layer.name; showHeads(); };
  }
  return box;
}

function drawWeights(context, layer, weights, largest) {
  context.filter = "grayscale(1) contrast(.6)";
  drawPicture(context);
  context.filter = "none";
  const scale = SIDE / about.width, [left, top, right, bottom] = layer.box;
  const inImage = box => box.map(n => n * scale);
  context.globalAlpha = 0.8;
  context.drawImage(map(weights, largest), ...sides(inImage(layer.box)));
  context.globalAlpha = 1;
  outline(context, inImage([left, top, Math.min(right, about.width), Math.min(bottom, about.height)]));
  if (right - left >= about.width * SMALL_WINDOW) return dot(context, pixelBox(), inImage);
  const { width, height } = context.canvas, [row, column] = answer.pixel;
  const reach = 0.41 * Math.min(width, height), unit = reach / Math.max(right - left, bottom - top);
  const place = (isBefore, side) => isBefore ? side - reach - 0.02 * SIDE : 0.02 * SIDE;  // in the opposite corner
  const x = place(column < about.width / 2, width), y = place(row < about.height / 2, height);
  const enlarged = box => box.map((n, i) => i % 2 ? y + (n - top) * unit : x + (n - left) * unit);
  context.drawImage(map(weights, largest), ...sides(enlarged(layer.box)));
  outline(context, enlarged(layer.box));
  dot(context, layer.query, enlarged);
}

function drawPicture(context) {
  context.drawImage(picture, 0, 0, context.canvas.width, context.canvas.height);
}

function begin(canvas) {
  [canvas.width, canvas.height] = [SIDE, Math.round(SIDE * about.height / about.width)];
  canvas.style.aspectRatio = `${about.width} / ${about.height}`;
  const context = canvas.getContext("2d");
  context.imageSmoothingEnabled = false;
  return context;
}

function map(weights, largest) {
  const canvas = document.createElement("canvas");
  [canvas.width, canvas.height] = [weights[0].length, weights.length];
  const context = canvas.getContext("2d"), image = context.createImageData(canvas.width, canvas.height);
  weights.flat().forEach((weight, n) => image.data.set([...colour(weight / (largest || 1)), 255], 4 * n));
  context.putImageData(image, 0, 0);
  return canvas;
}

function colour(share) {
  const place = share * (COLOURS.length - 1), low = Math.min(Math.floor(place), COLOURS.length - 2);
  return COLOURS[low].map((n, i) => n + (place - low) * (COLOURS[low + 1][i] - n));
}

const sides = ([left, top, right, bottom]) => [left, top, right - left, bottom - top];
const pixelBox = () => [answer.pixel[1], answer.pixel[0], answer.pixel[1] + 1, answer.pixel[0] + 1];
const meanOf = heads => heads[0].map((line, i) => line.map((_, j) => heads.reduce((a, h) => a + h[i][j], 0) / heads.length));

function outline(context, box) {
  for (const [style, width] of [["white", 5], ["black", 2]]) {  // visible on dark images too
    [context.strokeStyle, context.lineWidth] = [style, width];
    context.strokeRect(...sides(box));
  }
}

function dot(context, box, place, radius = 12) {
  const [left, top, right, bottom] = place(box);
  context.beginPath();
  context.arc((left + right) / 2, (top + bottom) / 2, radius, 0, 2 * Math.PI);
  [context.fillStyle, context.strokeStyle, context.lineWidth] = ["white", "black", 2];
  context.fill();
  context.stroke();
}

function spanOf(text) {
  const span = document.createElement("span");
  span.textContent = text;
  return span;
}

function drop(event) {
  event.preventDefault();
  at("drop").classList.remove("over");
  const [first] = event.dataTransfer.files;
  if (first) look(first); else say("drop an image file; a link or a text is not one", true);
}

function choosePixel(row, column) {
  const inside = (n, size) => Math.max(0, Math.min(size - 1, n));
  if (answer && answer.layers.length) look(file, [inside(row, about.height), inside(column, about.width)]);
}

addEventListener("dragover", event => { event.preventDefault(); at("drop").classList.add("over"); });
addEventListener("dragleave", event => { if (!event.relatedTarget) at("drop").classList.remove("over"); });
addEventListener("drop", drop);
at("file").onchange = event => {
  if (event.target.files.length) look(event.target.files[0]);
  event.target.value = "";  // so that the same file can be chosen again
};
at("picture").onclick = event => {
  const box = at("picture").getBoundingClientRect();
  const row = (event.clientY - box.top) / box.height, column = (event.clientX - box.left) / box.width;
  choosePixel(Math.floor(row * about.height), Math.floor(column * about.width));
};
at("picture").onkeydown = event => {
  const step = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
  if (!step || !answer) return;
  event.preventDefault();
  choosePixel(answer.pixel[0] + step[0], answer.pixel[1] + step[1]);
};

fetched("model").then(found => {
  about = found;
  at("model").textContent = document.title = `${about.model}, ${about.classes} classes`;
  at("about").textContent = about.checkpoint;
  at("note").textContent = about.note;
  at("note").hidden = !about.note;
}).catch(error => say(error.message, true));
