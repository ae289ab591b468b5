"use strict";

// A report within the page is as high as it is: the page alone scrolls.
function stemFit(frame) {
  const root = frame.contentDocument.documentElement;
  const fit = () => { frame.style.height = `${root.scrollHeight}px`; };
  new frame.contentWindow.ResizeObserver(fit).observe(root);
  fit();
}

// With a copy button in it, Gradio's label names the button and leaves its field without a name.
new MutationObserver(() => {
  for (const field of document.querySelectorAll("textarea[data-testid=textbox]:not([aria-label])")) {
    const label = field.closest("label, .block")?.querySelector("[data-testid=block-info]");
    if (label) field.setAttribute("aria-label", label.textContent.trim());
  }
}).observe(document.documentElement, { childList: true, subtree: true });
