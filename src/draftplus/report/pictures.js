"use strict";
(() => {
  // A picture opens at its full size: by a click, or by Enter or Space; the arrow keys go on, Escape closes

  const viewer = document.getElementById("viewer");
  const caption = viewer.querySelector("p");
  const image = new Image();
  caption.before(image);
  const tiles = [...document.querySelectorAll("img.tile, img.grid")];
  let open = null;

  function show(tile) {
    open = tile;
    image.src = tile.src;
    image.alt = tile.alt;
    caption.textContent = [tile.alt, tile.dataset.file].filter(Boolean).join(" · ");
    if (!viewer.open) viewer.showModal();
  }

  for (const tile of tiles) {
    tile.tabIndex = 0;
    tile.setAttribute("role", "button");
    tile.setAttribute("aria-label", `${tile.alt}: open at full size`);
    tile.addEventListener("click", () => show(tile));
    tile.addEventListener("keydown", (event) => {
      if (event.key !== "Enter" && event.key !== " ") return;
      event.preventDefault();
      show(tile);
    });
  }
  viewer.addEventListener("click", () => viewer.close());
  viewer.addEventListener("close", () => open?.focus());
  viewer.addEventListener("keydown", (event) => {
    const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!by) return;
    event.preventDefault();
    const visible = tiles.filter((tile) => tile.getClientRects().length > 0);
    show(visible[(visible.indexOf(open) + by + visible.length) % visible.length]);
  });
})();
