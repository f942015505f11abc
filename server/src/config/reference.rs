//! Owns the list of every limit, for people: what operators set and what the protocol fixes. The
//! documentation is generated from it, and `slipstream limits` prints it.

use super::setting::{self, Setting};
use crate::grpc::limits;

/// One line of [`limits_table`]: name, what is allowed, default or what happens beyond it.
type Line = Vec<String>;

/// `docs/configuration.md`.
#[must_use]
pub fn markdown() -> String {
    let mut out = String::from(INTRODUCTION);
    let mut heading = String::new();
    for setting in setting::all() {
        if setting.heading != heading {
            heading.clone_from(&setting.heading);
            out.push_str(&format!(
                "\n### {heading}\n\n| key | flag | environment | default | range | meaning |\n\
                 |---|---|---|---|---|---|\n"
            ));
        }
        let cells = [
            format!("`{}`", setting.key),
            format!("`--{}`", setting.flag),
            format!("`{}`", setting.variable),
            default(&setting),
            setting.range(),
            setting.help.clone(),
        ];
        out.push_str(&row(&cells));
    }
    out.push_str(FIXED);
    for limit in limits::TABLE {
        let cells = [limit.name, &limit.allowed.to_string(), limit.unit, limit.beyond];
        out.push_str(&row(&cells.map(str::to_owned)));
    }
    out
}

/// The same as short lines with columns: settings first, then what the protocol fixes.
pub(crate) fn limits_table() -> (Vec<Line>, Vec<Line>) {
    let titles = |names: [&str; 4]| names.map(str::to_owned).to_vec();
    let mut settings = vec![titles(["setting", "default", "range", "environment"])];
    for setting in setting::all() {
        let (default, range) = (plain_default(&setting), setting.range());
        settings.push(vec![format!("--{}", setting.flag), default, range, setting.variable]);
    }
    let mut fixed = vec![titles(["field of a request", "allowed", "beyond it", "unit"])];
    for limit in limits::TABLE {
        let cells = [limit.name, &limit.allowed.to_string(), limit.beyond, limit.unit];
        fixed.push(cells.map(|cell| cell.replace('`', "")).to_vec());
    }
    (settings, fixed)
}

fn default(setting: &Setting) -> String {
    match &setting.default {
        Some(value) => format!("`{value}`"),
        None => setting.derived_default.unwrap_or_default().to_owned(),
    }
}

fn plain_default(setting: &Setting) -> String {
    let derived = || setting.derived_default.unwrap_or_default().to_owned();
    setting.default.clone().unwrap_or_else(derived)
}

fn row(cells: &[String]) -> String {
    let cells: Vec<String> = cells.iter().map(|cell| cell.replace('|', "\\|")).collect();
    format!("| {} |\n", cells.join(" | "))
}

const INTRODUCTION: &str = "\
# Configuration

<!-- Generated from the code; do not edit. `SLIPSTREAM_WRITE_DOCS=1 cargo test --release -p \
slipstream-tests --test slipstream -- settings::` writes it anew. -->

## Layers

Every setting can be given in three places. The first one that has it wins:

1. the command line: `slipstream serve --max-running 32`
2. the environment: `SLIPSTREAM_MAX_RUNNING=32`
3. a TOML file named by `--config FILE` or `SLIPSTREAM_CONFIG`: `max_running = 32`

What none of them sets has its default. The file is one flat table: all keys stand at its top \
level, named like the flags with `_` for `-`.

```toml
listen = \"0.0.0.0:50051\"
grace = \"30s\"
kv_memory = \"4GiB\"
max_running = 32
gzip = false
```

Times have a unit (`200ms`, `30s`, `5m`, `2h`), sizes too (`64KiB`, `512MiB`, `4GiB`, `1TiB`) or \
are bytes. Unknown keys and values of a wrong type or outside their range are refused, with the \
line and what would do. Of `kv_blocks` and `kv_memory`, which exclude each other, the one from the \
higher layer wins. A variable that begins with `SLIPSTREAM_` and that nothing reads is warned of. \
`generate`, `chat`, `demo` and `self-test` take the settings about models and engine from the same \
three places and leave the others to `serve`.

`slipstream check-config` takes the flags of `serve`, checks everything without loading a model, \
and prints the configuration in effect as such a file, each line with the place it comes from; \
`--json` prints it for programs. Exit code 2 says that something is wrong. `slipstream limits` \
prints the tables below.

## What operators set
";

const FIXED: &str = "
## What the protocol fixes

Bounds of one request, the same on every server. A request beyond one ends with the status, and \
its message names the field, the value and the limit.

| field | allowed | unit | beyond |
|---|---|---|---|
";
