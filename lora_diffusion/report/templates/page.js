"use strict";
// Without this script the page shows all images; with it, each opens large, beside the base's image of the same
// prompt and seed under a slider. On paper nothing can be unfolded, so all is.
(() => {
  const dialog = document.querySelector("dialog");
  const stage = dialog.querySelector(".stage");
  const [after, before] = [stage.querySelector(".after"), stage.querySelector(".before")];
  const slide = dialog.querySelector(".slide");
  const ends = dialog.querySelector(".ends");
  const about = dialog.querySelector(".zoom-about");
  const shots = [...document.querySelectorAll(".shot")];
  const bases = new Map(shots.filter((shot) => shot.dataset.role === "base").map((shot) => [shot.dataset.pair, shot]));
  let shown = 0;

  const cut = () => stage.style.setProperty("--cut", `${slide.value}%`);

  function show(index) {
    shown = (index + shots.length) % shots.length;
    const shot = shots[shown];
    const image = shot.querySelector("img");
    const base = shot.dataset.role === "base" ? undefined : bases.get(shot.dataset.pair);
    stage.toggleAttribute("data-alone", !base);
    slide.hidden = ends.hidden = !base;
    after.src = image.src;
    after.alt = image.alt;
    before.src = base ? base.querySelector("img").src : image.src;
    before.alt = base ? base.querySelector("img").alt : "";
    stage.style.setProperty("--shape", `${image.naturalWidth} / ${image.naturalHeight}`);
    about.textContent = image.alt;
    cut();
  }

  function open(index) {
    slide.value = 50;
    show(index);
    dialog.showModal();
    (slide.hidden ? dialog.querySelector(".close") : slide).focus();
  }

  shots.forEach((shot, index) => {
    const image = shot.querySelector("img");
    shot.classList.add("zoomable");
    image.tabIndex = 0;
    image.setAttribute("role", "button");
    image.addEventListener("click", () => open(index));
    image.addEventListener("keydown", (event) => {
      if (event.key === "Enter" || event.key === " ") {
        event.preventDefault();
        open(index);
      }
    });
  });

  slide.addEventListener("input", cut);
  const drag = (event) => {
    if (slide.hidden || !(event.buttons & 1)) return;
    const box = stage.getBoundingClientRect();
    slide.value = (100 * (event.clientX - box.left)) / box.width;
    cut();
  };
  stage.addEventListener("pointerdown", drag);
  stage.addEventListener("pointermove", drag);
  dialog.querySelector(".previous").addEventListener("click", () => show(shown - 1));
  dialog.querySelector(".next").addEventListener("click", () => show(shown + 1));
  dialog.querySelector(".close").addEventListener("click", () => dialog.close());
  dialog.addEventListener("click", (event) => event.target === dialog && dialog.close());
  dialog.addEventListener("keydown", (event) => {
    if (event.key === "PageUp" || (event.key === "ArrowLeft" && document.activeElement !== slide)) show(shown - 1);
    else if (event.key === "PageDown" || (event.key === "ArrowRight" && document.activeElement !== slide)) show(shown + 1);
    else return;
    event.preventDefault();
  });
  const unfolded = [];
  addEventListener("beforeprint", () => {
    for (const folded of document.querySelectorAll("details:not([open])")) {
      folded.open = true;
      unfolded.push(folded);
    }
  });
  addEventListener("afterprint", () => unfolded.splice(0).forEach((own) => own.removeAttribute("open")));
  dialog.addEventListener("close", () => shots[shown].querySelector("img").focus({ preventScroll: false }));
})();
