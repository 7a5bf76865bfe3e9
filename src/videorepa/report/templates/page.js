'use strict';
const one = (selector, root = document) => root.querySelector(selector);
const all = (selector, root = document) => [...root.querySelectorAll(selector)];

// One clock moves every clip in sight, so that all show the same moment.

const bar = one('.player');
const slider = one('[name=time]', bar);
const home = bar.parentElement;
const inSight = new Map();
const dialog = one('#rating');
const calm = matchMedia('(prefers-reduced-motion: reduce)').matches;
let playing = !calm;
let time = 0, before = 0, length = 0, fps = 0, next = 0;

const moved = () => (dialog?.open ? all('.pair video', dialog) : [...inSight.values()]);

// A video element holds a hundred others, for controls: only clips in sight have one.
function load(place) {
  const video = document.createElement('video');
  const { src, label } = place.dataset;
  Object.assign(video, { src, ariaLabel: label, muted: true, playsInline: true, preload: 'auto' });
  place.replaceChildren(video);
  return video;
}

function unload(place) {
  for (const video of all('video', place)) {
    video.removeAttribute('src');
    video.load();
  }
  place.replaceChildren();
}

const rate = (video) => Number(video.parentElement.dataset.fps);

function follow(video) {
  if (!(video.duration > 0)) return;
  // The middle of the last frame: at a frame's edge a browser may show the one before.
  const end = video.duration - 0.5 / rate(video);
  const behind = Math.min(time, end) - video.currentTime;
  const stands = !playing || time > end;
  if (stands && !video.paused) video.pause();
  if (stands ? Math.abs(behind) > 1e-3 : Math.abs(behind) > 0.3) {
    // One seek at a time; the next follows when this one is done.
    if (!video.seeking) video.currentTime += behind;
  }
  if (stands) return;
  // What is a little off catches up or waits without a jump.
  video.playbackRate = Math.min(2, Math.max(0.5, 1 + 3 * behind));
  // Pausing right after play() rejects its promise, which is no failure here.
  if (video.paused) video.play().catch(() => {});
}

function show() {
  const videos = moved().filter((video) => video.duration > 0);
  length = Math.max(0, ...videos.map((video) => video.duration));
  fps = Math.max(0, ...videos.map(rate));
  videos.forEach(follow);
  slider.max = length || 1;
  slider.value = time;
  const frames = Math.round(length * fps);
  const frame = Math.min(Math.floor(time * fps + 0.01) + 1, frames);
  const said = frames ? `frame ${frame} of ${frames}, ${time.toFixed(2)} s` : 'no clip in sight';
  one('output', bar).textContent = said;
  slider.setAttribute('aria-valuetext', said);
}

function tick(now) {
  // A tab that was hidden goes on where it was.
  time += Math.min(0.25, Math.max(0, now - before) / 1000);
  before = now;
  if (length && time >= length) {
    time = 0;
    moved().forEach((video) => { video.currentTime = 0; });
  }
  show();
  next = requestAnimationFrame(tick);
}

function play(on) {
  playing = on;
  one('[data-do=toggle]', bar).textContent = on ? 'Pause' : 'Play';
  before = performance.now();
  cancelAnimationFrame(next);
  if (on) next = requestAnimationFrame(tick);
  else show();
}

function step(frames) {
  const count = Math.max(1, Math.round(length * fps));
  const frame = Math.min(Math.floor(time * fps + 0.01), count - 1);
  time = fps ? ((frame + frames + count) % count + 0.5) / fps : 0;
  play(false);
}

for (const kind of ['loadeddata', 'seeked']) {
  document.addEventListener(kind, () => show(), true);
}
slider.addEventListener('input', () => {
  time = Number(slider.value);
  play(false);
});

// Clips load when they come into sight: a page may have thousands.
const watch = new IntersectionObserver((entries) => {
  for (const { target, isIntersecting } of entries) {
    if (isIntersecting && !inSight.has(target)) {
      inSight.set(target, load(target));
    } else if (!isIntersecting && inSight.delete(target)) {
      unload(target);
    }
  }
  show();
}, { rootMargin: '200px 0px' });
all('.row .clip').forEach((place) => watch.observe(place));

// Filters.

const filters = one('.filters');
const rows = all('#clips .row');
const figures = new Map(rows.map((row) => [row, all('figure', row)]));
const texts = new Map(rows.map((row) => [row, one('.words', row).textContent.toLowerCase()]));

function fits(row) {
  const { text, category, check, verdict, differ } = filters.elements;
  const words = text.value.toLowerCase().split(/\s+/);
  if (!words.every((word) => texts.get(row).includes(word))) return false;
  if (category?.value && row.dataset.category !== category.value) return false;
  const of = figures.get(row);
  if (check?.value && !of.some((f) => f.dataset.fails.split(' ').includes(check.value))) return false;
  if (!verdict) return true;
  const found = of.map((figure) => figure.dataset.verdicts[verdict.value]);
  const wanted = all('.of-model', filters).map((select) => select.value);
  if (!wanted.every((letter, place) => !letter || found[place] === letter)) return false;
  return !differ?.checked || (found.includes('0') && found.includes('1'));
}

function filter() {
  let count = 0;
  for (const row of rows) {
    row.hidden = !fits(row);
    count += !row.hidden;
  }
  filters.elements.found.textContent = `${count} of ${rows.length} shown`;
}

if (filters) {
  filters.hidden = false;
  filters.addEventListener('input', filter);
  filters.addEventListener('reset', () => setTimeout(filter));
  filters.addEventListener('submit', (event) => event.preventDefault());
  filter();
}

function go(way) {
  const shown = rows.filter((row) => !row.hidden);
  const top = (row) => row.getBoundingClientRect().top - bar.offsetHeight;
  const row = way > 0 ? shown.find((each) => top(each) > 2)
    : shown.findLast((each) => top(each) < -2);
  if (row) scrollBy(0, top(row));
}

// Blind rating: two clips of a prompt, their models unnamed and their places shuffled.

const answers = [];
let queue = [], asked = 0, begun = 0, unsaved = 0;

// The same rater is always shown the same order and places, another rater others.
function shuffle(...parts) {
  let hash = 2166136261;
  for (const letter of parts.join('\n')) hash = Math.imul(hash ^ letter.codePointAt(0), 16777619);
  hash = Math.imul(hash ^ (hash >>> 16), 2246822507);
  hash = Math.imul(hash ^ (hash >>> 13), 3266489909);
  return (hash ^ (hash >>> 16)) >>> 0;
}

function pairs(setup) {
  const { rater, question, a, b } = setup.elements;
  const known = new Set(answers.map((answer) =>
    [answer.question, answer.prompt_id, answer.k, ...[answer.left, answer.right].sort()].join('\n')));
  const found = [];
  for (const row of rows) {
    const { prompt, k } = row.dataset;
    const clips = [a, b].map((select) => one('.clip', figures.get(row)[select.value])?.dataset);
    if (!clips[0] || !clips[1] || clips[0].clip === clips[1].clip) continue;
    clips.sort((one, other) => (one.clip < other.clip ? -1 : 1));
    const key = [question.value, prompt, k, ...clips.map((each) => each.clip)];
    if (known.has(key.join('\n'))) continue;
    const order = shuffle(rater.value, ...key);
    if (order & 1) clips.reverse();
    found.push({ order, row, clips, question: question.value });
  }
  return found.sort((one, other) => one.order - other.order);
}

function ask() {
  const over = asked >= queue.length;
  one('.setup', dialog).hidden = true;
  one('.pair', dialog).hidden = over;
  one('.done', dialog).hidden = !over;
  one('.kept', dialog).hidden = !answers.length;
  one('.kept output', dialog).textContent =
    `Answers: ${answers.length}, not saved: ${unsaved}.`;
  one('[data-do=rate]').textContent = unsaved ? `Rate blind (${unsaved} not saved)` : 'Rate blind';
  if (over) return;
  // What moves the clips has to be within the dialog to be reached.
  one('.pair .cells', dialog).after(bar);
  const { row, clips, question } = queue[asked];
  one('.progress', dialog).textContent = `${asked + 1} of ${queue.length}`;
  one('.asked', dialog).textContent = one(`[value=${question}]`, dialog).textContent;
  one('.pair .prompt', dialog).textContent = one('.full, p.prompt', row).textContent;
  all('.pair figure > div', dialog).forEach((place, side) => {
    const model = one(`[data-clip="${clips[side].clip}"]`, row);
    place.className = model.className;
    place.style.aspectRatio = model.style.aspectRatio;
    Object.assign(place.dataset, { src: clips[side].src, fps: clips[side].fps, label: 'AB'[side] });
    load(place);
  });
  time = 0;
  begun = performance.now();
  play(!calm);
}

function answer(preferred) {
  const { row, clips, question } = queue[asked];
  const [left, right] = clips.map((each) => each.clip);
  const seconds = Math.round((performance.now() - begun) / 100) / 10;
  const { prompt, k } = row.dataset;
  answers.push({ prompt_id: prompt, k: Number(k), question, left, right, preferred, seconds });
  asked += 1;
  unsaved += 1;
  ask();
}

function undo() {
  if (!asked) return;
  answers.pop();
  asked -= 1;
  unsaved = Math.max(0, unsaved - 1);
  ask();
}

function save() {
  const rater = one('[name=rater]', dialog).value;
  const content = { format: dialog.dataset.format, rater, ratings: answers };
  const url = URL.createObjectURL(new Blob([JSON.stringify(content, null, 1)]));
  const name = rater.replace(/[^\p{L}\p{N}_-]+/gu, '-');
  Object.assign(document.createElement('a'), { href: url, download: `ratings-${name}.json` }).click();
  URL.revokeObjectURL(url);
  unsaved = 0;
  ask();
}

async function resume(input) {
  const said = one('[role=status]', dialog);
  try {
    const found = JSON.parse(await input.files[0].text());
    if (found.format !== dialog.dataset.format) throw new Error('it is something else');
    answers.splice(0, Infinity, ...found.ratings);
    one('[name=rater]', dialog).value = found.rater;
    keepName();
    said.textContent = `Answers of ${found.rater}: ${answers.length}.`;
  } catch (error) {
    said.textContent = `That is not a file of ratings: ${error.message}.`;
  }
}

// A file is of one rater: with answers there, the name stays.
function keepName() {
  one('[name=rater]', dialog).readOnly = answers.length > 0;
}

function begin() {
  keepName();
  one('.setup', dialog).hidden = false;
  for (const part of ['.pair', '.done']) one(part, dialog).hidden = true;
  dialog.showModal();
}

if (dialog) {
  one('.setup', dialog).addEventListener('submit', (event) => {
    event.preventDefault();
    queue = pairs(event.target);
    asked = 0;
    if (queue.length) ask();
    else one('[role=status]', dialog).textContent =
      'No pair is left to ask about: all are answered, or their clips are the same.';
  });
  one('[name=file]', dialog).addEventListener('change', (event) => resume(event.target));
  dialog.addEventListener('close', () => {
    home.prepend(bar);
    all('.pair .clip', dialog).forEach(unload);
    show();
  });
  dialog.addEventListener('click', ({ target }) => {
    const button = target.closest('[data-answer]');
    if (!button) return;
    // Or Space, meant to pause, would give the same answer to the next pair.
    button.blur();
    answer(button.dataset.answer);
  });
  addEventListener('beforeunload', (event) => { if (unsaved) event.preventDefault(); });
}

// Buttons and keys.

const actions = {
  toggle: () => play(!playing),
  restart: () => { time = 0; play(playing); },
  back: () => step(-1),
  forward: () => step(1),
  next: () => go(1),
  previous: () => go(-1),
  search: () => filters?.elements.text.focus(),
  rate: () => dialog && begin(),
  undo, save,
};
document.addEventListener('click', ({ target }) => actions[target.closest('[data-do]')?.dataset.do]?.());

const keys = {
  ' ': 'toggle', r: 'restart', ArrowLeft: 'back', ArrowRight: 'forward',
  j: 'next', k: 'previous', '/': 'search', b: 'rate',
};
const ratingKeys = { 1: 'left', 0: 'same', 2: 'right' };
document.addEventListener('keydown', (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.target.closest('input, select, textarea')) return;
  if (event.key === ' ' && event.target.closest('button, summary, a')) return;
  let action = actions[keys[event.key]];
  if (dialog?.open) {
    if (one('.pair', dialog).hidden) return;
    if (event.key === 'Backspace') action = undo;
    else if (event.key in ratingKeys) action = () => answer(ratingKeys[event.key]);
    else if (!['toggle', 'back', 'forward', 'restart'].includes(keys[event.key])) return;
  }
  if (!action) return;
  event.preventDefault();
  action();
});

bar.hidden = false;
play(playing);
