// What every part of the page uses.

export const by = (id) => document.getElementById(id);

const number = new Intl.NumberFormat("en");
export const show = (count) => number.format(count);
