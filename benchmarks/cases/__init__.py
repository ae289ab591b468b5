"""What is compared and how: cases, contenders, timing, memory, floors."""
