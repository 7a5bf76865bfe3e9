'use strict';
const one = (selector, root = document) => root.querySelector(selector);
const all = (selector, root = document) => [...root.querySelectorAll(selector)];

// One clock drives every visible clip, so that all show the same moment.

const bar = one('.player');
const slider = one('[name=time]', bar);
const barHome = bar.parentElement;
const inSight = new Map();
const dialog = one('#rating');
const reducedMotion = matchMedia('(prefers-reduced-motion: reduce)').matches;
let playing = !reducedMotion;
let time = 0, lastTick = 0, length = 0, fps = 0, nextTick = 0;

const driven = () => (dialog?.open ? all('.pair video', dialog) : [...inSight.values()]);

// Only visible clips have a video element, since each holds a hundred others for its controls.
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
  // The middle of the last frame, since at a frame's edge a browser may show the one before.
  const end = video.duration - 0.5 / rate(video);
  const behind = Math.min(time, end) - video.currentTime;
  const still = !playing || time > end;
  if (still && !video.paused) video.pause();
  // A seek that is under way calls this function again when it is done.
  if (Math.abs(behind) > (still ? 1e-3 : 0.3) && !video.seeking) video.currentTime += behind;
  if (still) return;
  // A clip that is a little off catches up, or waits, without a jump.
  video.playbackRate = Math.min(2, Math.max(0.5, 1 + 3 * behind));
  // The promise of play() is rejected if a pause follows at once, which is no failure here.
  if (video.paused) video.play().catch(() => {});
}

function show() {
  const videos = driven().filter((video) => video.duration > 0);
  length = Math.max(0, ...videos.map((video) => video.duration));
  fps = Math.max(0, ...videos.map(rate));
  videos.forEach(follow);
  slider.max = length || 1;
  slider.value = time;
  const frames = Math.round(length * fps);
  const frame = Math.min(Math.floor(time * fps + 0.01) + 1, frames);
  const moment = frames ? `frame ${frame} of ${frames}, ${time.toFixed(2)} s` : 'no visible clip';
  one('output', bar).textContent = moment;
  slider.setAttribute('aria-valuetext', moment);
}

function tick(now) {
  // A tab that was hidden continues where it stopped.
  time += Math.min(0.25, Math.max(0, now - lastTick) / 1000);
  lastTick = now;
  if (length && time >= length) {
    time = 0;
    driven().forEach((video) => { video.currentTime = 0; });
  }
  show();
  nextTick = requestAnimationFrame(tick);
}

function play(on) {
  playing = on;
  one('[data-do=toggle]', bar).textContent = on ? 'Pause' : 'Play';
  lastTick = performance.now();
  cancelAnimationFrame(nextTick);
  if (on) nextTick = requestAnimationFrame(tick);
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

// Clips load when they scroll into view, since a page may have thousands.
const observer = new IntersectionObserver((entries) => {
  for (const { target, isIntersecting } of entries) {
    if (isIntersecting && !inSight.has(target)) {
      inSight.set(target, load(target));
    } else if (!isIntersecting && inSight.delete(target)) {
      unload(target);
    }
  }
  show();
}, { rootMargin: '200px 0px' });
all('.row .clip').forEach((place) => observer.observe(place));

// Filters.

const filters = one('.filters');
const rows = all('#clips .row');
const figures = new Map(rows.map((row) => [row, all('figure[data-verdicts]', row)]));
const texts = new Map(rows.map((row) => [row, one('.words', row).textContent.toLowerCase()]));

function matches(row) {
  const { text, category, check, verdict, differ } = filters.elements;
  const words = text.value.toLowerCase().split(/\s+/);
  if (!words.every((word) => texts.get(row).includes(word))) return false;
  if (category?.value && row.dataset.category !== category.value) return false;
  const cells = figures.get(row);
  if (check?.value && !cells.some((f) => f.dataset.fails.split(' ').includes(check.value))) return false;
  if (!verdict) return true;
  const letters = cells.map((figure) => figure.dataset.verdicts[verdict.value]);
  const wanted = all('.of-model', filters).map((select) => select.value);
  if (!wanted.every((letter, model) => !letter || letters[model] === letter)) return false;
  return !differ?.checked || (letters.includes('0') && letters.includes('1'));
}

function filter() {
  let count = 0;
  for (const row of rows) {
    row.hidden = !matches(row);
    count += !row.hidden;
  }
  filters.elements.count.textContent = `${count} of ${rows.length} shown`;
}

if (filters) {
  filters.hidden = false;
  filters.addEventListener('input', filter);
  filters.addEventListener('reset', () => setTimeout(filter));
  filters.addEventListener('submit', (event) => event.preventDefault());
  filter();
}

function scrollToRow(direction) {
  const shown = rows.filter((row) => !row.hidden);
  const top = (row) => row.getBoundingClientRect().top - bar.offsetHeight;
  const row = direction > 0 ? shown.find((each) => top(each) > 2)
    : shown.findLast((each) => top(each) < -2);
  if (row) scrollBy(0, top(row));
}

// Blind rating of two clips of a prompt, in random order and without their models' names.

const answers = [];
let queue = [], current = 0, askedAt = 0, unsaved = 0;

// A rater always gets the same order and sides. Other raters get others.
function hashOf(...parts) {
  let hash = 2166136261;
  for (const letter of parts.join('\n')) hash = Math.imul(hash ^ letter.codePointAt(0), 16777619);
  hash = Math.imul(hash ^ (hash >>> 16), 2246822507);
  hash = Math.imul(hash ^ (hash >>> 13), 3266489909);
  return (hash ^ (hash >>> 16)) >>> 0;
}

function unratedPairs(setup) {
  const { rater, question, a, b } = setup.elements;
  const rated = new Set(answers.map((answer) =>
    [answer.question, answer.prompt_id, answer.k, ...[answer.left, answer.right].sort()].join('\n')));
  const unrated = [];
  for (const row of rows) {
    const { prompt, k } = row.dataset;
    const clips = [a, b].map((select) => one('.clip', figures.get(row)[select.value])?.dataset);
    if (!clips[0] || !clips[1] || clips[0].clip === clips[1].clip) continue;
    clips.sort((x, y) => (x.clip < y.clip ? -1 : 1));
    const key = [question.value, prompt, k, ...clips.map((each) => each.clip)];
    if (rated.has(key.join('\n'))) continue;
    const order = hashOf(rater.value, ...key);
    if (order & 1) clips.reverse();
    unrated.push({ order, row, clips, question: question.value });
  }
  return unrated.sort((x, y) => x.order - y.order);
}

function ask() {
  const done = current >= queue.length;
  one('.setup', dialog).hidden = true;
  one('.pair', dialog).hidden = done;
  one('.done', dialog).hidden = !done;
  one('.saving', dialog).hidden = !answers.length;
  one('.saving output', dialog).textContent =
    `Answers: ${answers.length}, not saved: ${unsaved}.`;
  one('[data-do=rate]').textContent = unsaved ? `Rate blind (${unsaved} not saved)` : 'Rate blind';
  if (done) return;
  // Only controls within the dialog can be reached.
  one('.pair .cells', dialog).after(bar);
  const { row, clips, question } = queue[current];
  one('.progress', dialog).textContent = `${current + 1} of ${queue.length}`;
  one('.question', dialog).textContent = one(`[value=${question}]`, dialog).textContent;
  one('.pair .prompt', dialog).textContent = one('.full, p.prompt', row).textContent;
  all('.pair figure > div', dialog).forEach((place, side) => {
    const original = one(`[data-clip="${clips[side].clip}"]`, row);
    place.className = original.className;
    place.style.aspectRatio = original.style.aspectRatio;
    Object.assign(place.dataset, { src: clips[side].src, fps: clips[side].fps, label: 'AB'[side] });
    load(place);
  });
  time = 0;
  askedAt = performance.now();
  play(!reducedMotion);
}

function answer(preferred) {
  const { row, clips, question } = queue[current];
  const [left, right] = clips.map((each) => each.clip);
  const seconds = Math.round((performance.now() - askedAt) / 100) / 10;
  const { prompt, k } = row.dataset;
  answers.push({ prompt_id: prompt, k: Number(k), question, left, right, preferred, seconds });
  current += 1;
  unsaved += 1;
  ask();
}

function undo() {
  if (!current) return;
  answers.pop();
  current -= 1;
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
  const status = one('[role=status]', dialog);
  try {
    const { format, rater, ratings } = JSON.parse(await input.files[0].text());
    if (format !== dialog.dataset.format) throw new Error(`its format is ${format}`);
    answers.splice(0, Infinity, ...ratings);
    one('[name=rater]', dialog).value = rater;
    lockName();
    status.textContent = `Answers of ${rater}: ${answers.length}.`;
  } catch (error) {
    status.textContent = `This is not a file of ratings: ${error.message}.`;
  }
}

// A file has one rater, so the name cannot change once there are answers.
function lockName() {
  one('[name=rater]', dialog).readOnly = answers.length > 0;
}

function begin() {
  lockName();
  one('.setup', dialog).hidden = false;
  for (const part of ['.pair', '.done']) one(part, dialog).hidden = true;
  dialog.showModal();
}

if (dialog) {
  one('.setup', dialog).addEventListener('submit', (event) => {
    event.preventDefault();
    queue = unratedPairs(event.target);
    current = 0;
    if (queue.length) ask();
    else one('[role=status]', dialog).textContent =
      'No pair is left to ask about: each is answered already, or its two clips are the same.';
  });
  one('[name=file]', dialog).addEventListener('change', (event) => resume(event.target));
  dialog.addEventListener('close', () => {
    barHome.prepend(bar);
    all('.pair .clip', dialog).forEach(unload);
    show();
  });
  dialog.addEventListener('click', ({ target }) => {
    const button = target.closest('[data-answer]');
    if (!button) return;
    // Without focus, the button is not pressed by a Space that should pause.
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
  next: () => scrollToRow(1),
  previous: () => scrollToRow(-1),
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
