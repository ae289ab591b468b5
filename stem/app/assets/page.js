"use strict";

// A report within the page is as high as it is: the page alone scrolls.
function stemFit(frame) {
  const root = frame.contentDocument.documentElement;
  const fit = () => { frame.style.height = `${root.scrollHeight}px`; };
  new frame.contentWindow.ResizeObserver(fit).observe(root);
  fit();
}
