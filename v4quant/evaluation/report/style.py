"""The report's style sheet: one set of colour names, a value for light and one for dark each.

The two series differ in shape as well as in colour, and alarms carry a word or a sign, so that
nothing depends on seeing red. A table that is wider than the page has a shadow where it goes on.
Every plot is there twice: a narrow screen shows the one that was drawn for it, so that no label
shrinks and nothing scrolls sideways.
"""

from __future__ import annotations

STYLE = """
:root{--page:#fff;--ink:#1c2128;--soft:#57606a;--rule:#d8dee4;--panel:#f6f8fa;
--local:#1a56b8;--stream:#b4530f;--bar:#6c9bdc;--floor:#b4530f;--alarm:#c01c28;
--same:#1a7f37;--differs:#9a6700;
--swa:#8c959f;--csa:#2f7f7a;--hca:#8250df;--mtp:#bf8700;
--heat0:#eef3fa;--heat1:#d3e3f5;--heat2:#aecbeb;--heat3:#82aede;--heat4:#568fcd;
--heat5:#2f6fb7;--heat6:#174f92}
@media(prefers-color-scheme:dark){:root{--page:#12161c;--ink:#e6eaef;--soft:#9aa6b2;
--rule:#343c46;--panel:#1b2129;--local:#7db4ff;--stream:#ffab66;--bar:#4a79b8;--floor:#ffab66;
--alarm:#ff7b72;--same:#56d364;--differs:#e3b341;
--swa:#7d8590;--csa:#4fb8b0;--hca:#b18cf5;--mtp:#e3b341;
--heat0:#18222f;--heat1:#1d3350;--heat2:#234a77;--heat3:#2f65a0;--heat4:#4a86c5;
--heat5:#76a9e0;--heat6:#a9cdf5}}
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);
font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",sans-serif}
main{max-width:1120px;margin:0 auto;padding:24px 20px 60px}
h1{font-size:23px;line-height:1.3;margin:0 0 4px;font-weight:600;overflow-wrap:anywhere}
h2{font-size:17px;margin:34px 0 6px;font-weight:600}
p{margin:4px 0 10px;max-width:80ch}
section>p{color:var(--soft)}
code,pre{font-family:ui-monospace,"Cascadia Mono",Menlo,Consolas,monospace;font-size:.92em}
.identity{color:var(--soft);overflow-wrap:anywhere;max-width:none}
.verdict{border-left:5px solid var(--soft);background:var(--panel);padding:12px 16px;
margin:16px 0;font-size:17px;max-width:none;overflow-wrap:anywhere}
.verdict.same{border-color:var(--same)}.verdict.same strong{color:var(--same)}
.verdict.differs{border-color:var(--differs)}.verdict.differs strong{color:var(--differs)}
.findings{border-left:5px solid var(--alarm);background:var(--panel);padding:1px 16px 8px;
margin:16px 0}
.findings h2{color:var(--alarm);margin:10px 0 6px}.findings td:last-child{white-space:normal}
.clean{color:var(--same)}
.wide{overflow-x:auto;background:linear-gradient(90deg,var(--page) 30%,transparent),
linear-gradient(270deg,var(--page) 30%,transparent) 100% 0,
radial-gradient(farthest-side at 0 50%,var(--soft),transparent),
radial-gradient(farthest-side at 100% 50%,var(--soft),transparent) 100% 0;
background-repeat:no-repeat;background-size:40px 100%,40px 100%,10px 100%,10px 100%;
background-attachment:local,local,scroll,scroll}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}
th,td{text-align:right;padding:5px 8px;border-bottom:1px solid var(--rule);vertical-align:top}
th{font-weight:600;font-size:13px;color:var(--soft);vertical-align:bottom}
.name{text-align:left;min-width:8em;overflow-wrap:break-word}
.name+.name{min-width:6em}
td:not(.name){white-space:nowrap}
pre{background:var(--panel);padding:12px 16px;white-space:pre-wrap;overflow-wrap:anywhere}
svg{display:block;width:100%;height:auto;fill:var(--ink);font-size:12px;overflow:visible}
text{fill:var(--ink);paint-order:stroke;stroke:var(--page);stroke-width:3px;stroke-linejoin:round}
.tick{fill:var(--soft)}.axis{fill:var(--ink);font-size:13px}
.alarm{fill:var(--alarm);font-weight:600}
.grid{stroke:var(--rule)}.frame{stroke:var(--soft)}
.break{stroke:var(--soft);stroke-dasharray:2 4}
.local{fill:var(--local)}.stream{fill:var(--stream)}
.local-line,.stream-line{fill:none;stroke-width:1;opacity:.55}
.local-line{stroke:var(--local)}.stream-line{stroke:var(--stream)}
.cross{stroke:var(--alarm);stroke-width:2}.invisible{fill:transparent}
.bar{fill:var(--bar)}.floor{fill:none;stroke:var(--floor);stroke-width:2;stroke-dasharray:6 3}
.marker{stroke:var(--ink);stroke-dasharray:3 3}
.kind-swa{fill:var(--swa)}.kind-csa{fill:var(--csa)}.kind-hca{fill:var(--hca)}
.kind-mtp{fill:var(--mtp)}
.starved{fill:var(--alarm)}.heat0{fill:var(--heat0)}.heat1{fill:var(--heat1)}
.heat2{fill:var(--heat2)}.heat3{fill:var(--heat3)}.heat4{fill:var(--heat4)}
.heat5{fill:var(--heat5)}.heat6{fill:var(--heat6)}
.front{fill:none;stroke:var(--local);stroke-width:2}
.anchor{stroke:var(--soft);stroke-dasharray:8 5}
.verdict.damaged{border-color:var(--alarm)}.verdict.damaged strong{color:var(--alarm)}
a{color:var(--local)}
details{margin:8px 0}summary{cursor:pointer;padding:6px 0;overflow-wrap:anywhere}
dt{font-weight:600;margin-top:8px}dd{margin:0 0 4px;max-width:80ch}
.on-narrow{display:none;max-width:520px}
@media(max-width:800px){.on-narrow{display:block}.on-wide{display:none}}
@media(max-width:640px){
main{padding:16px 12px 40px}
thead{display:none}
table,tbody,tr,td{display:block;width:100%}
tr{border-bottom:2px solid var(--rule);padding:6px 0}
td,td:not(.name){display:flex;justify-content:space-between;gap:12px;border:0;padding:3px 0;
white-space:normal;text-align:right;overflow-wrap:anywhere}
td.name{min-width:0;text-align:left;font-weight:600}
td[data-label]:before{content:attr(data-label);color:var(--soft);font-weight:400;text-align:left;
flex:0 0 45%}
td:empty{display:none}
}
"""
