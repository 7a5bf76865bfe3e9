'use strict';
const videos = [...document.querySelectorAll('video')];
const bar = document.querySelector('.player');
const toggle = bar.querySelector('[data-do=toggle]');
let playing = !matchMedia('(prefers-reduced-motion: reduce)').matches;

function play(on) {
  playing = on;
  toggle.textContent = on ? 'Pause all' : 'Play all';
  for (const video of videos) {
    // Pausing right after play() rejects its promise, which is no failure here.
    if (on) video.play().catch(() => {});
    else video.pause();
  }
}

function seek(time) {
  for (const video of videos) {
    if (Number.isFinite(video.duration)) video.currentTime = time(video);
  }
}

function step(frames) {
  play(false);
  seek((video) => {
    const fps = Number(video.dataset.fps);
    const count = Math.max(1, Math.round(video.duration * fps));
    const frame = Math.min(Math.floor(video.currentTime * fps + 0.01), count - 1);
    // The middle of a frame: its edge may show the one before.
    return ((frame + frames + count) % count + 0.5) / fps;
  });
}

const actions = {
  toggle: () => play(!playing),
  restart: () => { seek(() => 0); play(true); },
  back: () => step(-1),
  forward: () => step(1),
};
bar.addEventListener('click', (event) => {
  const name = event.target.dataset.do;
  if (name) actions[name]();
});
bar.hidden = false;
play(playing);
