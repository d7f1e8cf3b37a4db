"""The style sheet of the report: one column on a phone, two on a desk, light and dark."""

CSS = """
:root {
  --paper: #fcfcfa; --card: #ffffff; --ink: #1b1d21; --muted: #6d7178; --rule: #e6e6e1;
  --good: #17805a; --bad: #c0392b; --bad-ground: #fdf0ee; --hidden: #c6c9cf;
  --c0: #1f5fd6; --c1: #12968a; --c2: #8b9099; --c3: #d98316; --c4: #9b4dca; --c5: #c2466b;
  --t0: #2f7bff; --t1: #ff8a1f; --t2: #17b890; --t3: #e0488b; --t4: #a06bff; --t5: #d8b400;
  --sans: -apple-system, BlinkMacSystemFont, "Segoe UI", Roboto, "Helvetica Neue",
    "Liberation Sans", Arial, sans-serif;
  --mono: ui-monospace, SFMono-Regular, Menlo, Consolas, "Liberation Mono", monospace;
  color-scheme: light dark;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #14161a; --card: #1b1e23; --ink: #e8e9eb; --muted: #989da6; --rule: #2d3138;
    --good: #4cc38a; --bad: #ff8576; --bad-ground: #33201e; --hidden: #444a54;
    --c0: #6aa0ff; --c1: #3fc9ba; --c2: #8a9099; --c3: #f0a74a; --c4: #c48bec; --c5: #ee7f9f;
  }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body {
  margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.6 var(--sans); font-variant-numeric: tabular-nums;
}
main, header, footer { max-width: 1120px; margin: 0 auto; padding: 0 32px; }
header { padding-top: 72px; padding-bottom: 8px; }
.kicker { color: var(--muted); font-size: 13px; letter-spacing: .09em; text-transform: uppercase; }
h1 {
  font-size: clamp(30px, 4.6vw, 46px); line-height: 1.12; letter-spacing: -.022em;
  font-weight: 700; margin: 10px 0 14px; overflow-wrap: anywhere;
}
.lede { font-size: 19px; line-height: 1.55; max-width: 44em; margin: 0; text-wrap: pretty; }
.lede b { font-weight: 650; }
.alarm {
  background: var(--bad-ground); border-left: 4px solid var(--bad); border-radius: 4px;
  padding: 12px 18px; margin: 20px 0 0; overflow-wrap: anywhere;
}
.alarm b { color: var(--bad); }
.tiles {
  display: grid; grid-template-columns: repeat(auto-fit, minmax(200px, 1fr)); margin: 36px 0 0;
  border-top: 1px solid var(--rule); border-bottom: 1px solid var(--rule);
}
.tile { padding: 20px 24px 18px 0; }
.tile .name { color: var(--muted); font-size: 13.5px; }
.tile .value { font-size: 36px; line-height: 1.25; font-weight: 650; letter-spacing: -.025em; }
.tile .note { font-size: 13.5px; color: var(--muted); }
.up { color: var(--good); } .down { color: var(--bad); }
section {
  display: grid; grid-template-columns: 236px minmax(0, 1fr); gap: 12px 44px;
  padding: 44px 0 40px; border-bottom: 1px solid var(--rule);
}
section:last-child { border-bottom: 0; }
h2 { font-size: 21px; line-height: 1.3; letter-spacing: -.012em; font-weight: 650;
  margin: 0 0 8px; }
.aside p { color: var(--muted); font-size: 14px; line-height: 1.55; margin: 0 0 10px; }
.body > * + * { margin-top: 26px; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(290px, 1fr));
  gap: 26px 34px; }
figure { margin: 0; min-width: 0; max-width: 520px; }
figcaption { font-size: 14px; font-weight: 600; margin-bottom: 6px; }
figcaption small { font-size: 13px; font-weight: 400; color: var(--muted); }
.chart { display: block; width: 100%; height: auto; overflow: visible; }
.chart * { stroke-linejoin: round; }
.chart text { font-family: var(--sans) !important; }
.keys { display: flex; flex-wrap: wrap; gap: 4px 20px; font-size: 13.5px; }
.key { display: inline-flex; align-items: center; gap: 8px; }
.key::before { content: ""; width: 18px; height: 0; border-top: 3px solid var(--c);
  border-radius: 2px; }
.key.dashed::before { width: 21px; height: 2px; border: 0; border-radius: 0;
  background: repeating-linear-gradient(90deg, var(--c) 0 5px, transparent 5px 8px); }
.key.dot::before { width: 10px; height: 10px; border: 0; border-radius: 50%; background: var(--c); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: 15px; }
th, td { text-align: right; padding: 9px 0 9px 20px; border-bottom: 1px solid var(--rule);
  white-space: nowrap; }
th { font-weight: 500; font-size: 13.5px; color: var(--muted); vertical-align: bottom; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
tbody tr:last-child td { border-bottom: 0; }
td.best { font-weight: 650; }
td small { color: var(--muted); }
.strip { display: grid; grid-template-columns: 92px 1fr; align-items: center; gap: 8px 14px;
  font-size: 13.5px; }
.track { position: relative; height: 26px; margin-right: 16px; }
.track::before { content: ""; position: absolute; left: 0; right: 0; top: 12px; height: 2px;
  background: var(--rule); }
.track i { position: absolute; top: 6px; width: 14px; height: 14px; margin-left: -7px;
  border-radius: 50%; background: var(--c); border: 2px solid var(--paper); }
.track span { position: absolute; top: 5px; font-size: 11px; line-height: 16px; color: var(--muted);
  transform: translateX(-50%); }
.track.scale { height: 20px; } .track.scale::before { display: none; }
img, .patches { display: block; width: 100%; height: auto; border-radius: 3px; }
.pixel { image-rendering: pixelated; }
.patches { background: var(--card); overflow: hidden; }
.veil { fill: var(--hidden); shape-rendering: crispEdges; }
.veil.half { opacity: .8; }
.block { fill: var(--c); opacity: .22; shape-rendering: crispEdges; }
.edge { fill: none; stroke: var(--c); stroke-width: 2px; stroke-linecap: square;
  vector-effect: non-scaling-stroke; }
.masks { display: grid; grid-template-columns: repeat(auto-fill, minmax(330px, 1fr));
  gap: 18px 36px; }
.three, .two { display: grid; gap: 8px; }
.three { grid-template-columns: repeat(3, 1fr); } .two { grid-template-columns: 1fr 1fr; }
.heads { font-size: 12.5px; color: var(--muted); }
.pairs { display: grid; grid-template-columns: repeat(auto-fill, minmax(176px, 1fr));
  gap: 18px 26px; }
.near { display: grid; gap: 6px; align-items: start; max-width: 760px; }
.near + .near { margin-top: 10px; }
.cell { padding-bottom: 7px; border-bottom: 3px solid transparent; }
.cell.yes { border-color: var(--good); } .cell.no { border-color: var(--bad); }
.map { max-width: 680px; }
pre { font: 13px/1.55 var(--mono); background: var(--card); border: 1px solid var(--rule);
  border-radius: 6px; padding: 14px 16px; margin: 0; overflow-x: auto; tab-size: 2; }
details summary { cursor: pointer; font-size: 14.5px; font-weight: 600; margin-bottom: 10px; }
details pre { max-height: 480px; overflow: auto; }
dl { display: grid; grid-template-columns: minmax(120px, max-content) 1fr; gap: 6px 28px;
  font-size: 14.5px; margin: 0; }
dt { color: var(--muted); } dd { margin: 0; overflow-wrap: anywhere; }
h3 { font-size: 14.5px; font-weight: 600; margin: 0 0 8px; }
footer { color: var(--muted); font-size: 13px; padding-top: 20px; padding-bottom: 56px; }
@media (max-width: 860px) {
  main, header, footer { padding-left: 20px; padding-right: 20px; }
  header { padding-top: 40px; }
  section { grid-template-columns: minmax(0, 1fr); padding: 34px 0 30px; }
  .lede { font-size: 17px; }
  .tiles { grid-template-columns: 1fr 1fr; }
  .tile { padding: 14px 12px 14px 0; } .tile .value { font-size: 27px; }
  th, td { padding-left: 10px; font-size: 14px; } th { font-size: 12.5px; white-space: normal; }
  .masks { grid-template-columns: minmax(0, 1fr); }
  .pairs { grid-template-columns: repeat(auto-fill, minmax(150px, 1fr)); }
  .near { gap: 3px; }
  .masks > :nth-child(2) .heads { display: none; }
}
@media print { section { break-inside: avoid; } }
"""
