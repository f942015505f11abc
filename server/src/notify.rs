//! Owns what systemd is told about the life of the server. Says nothing where nobody asked
//! (`NOTIFY_SOCKET` is unset).

use sd_notify::NotifyState;
use tokio::sync::watch;

use crate::stage::Stage;

/// Tells systemd every stage of the server that reports it, until that server ends.
pub(crate) async fn follow(mut stage: watch::Receiver<Stage>) {
    loop {
        let now = *stage.borrow_and_update();
        tell(now);
        if stage.changed().await.is_err() {
            return;
        }
    }
}

fn tell(stage: Stage) {
    let status = NotifyState::Status(stage.name());
    let told = match stage {
        Stage::Loading | Stage::Stuck => sd_notify::notify(&[status]),
        Stage::Serving => sd_notify::notify(&[NotifyState::Ready, status]),
        Stage::Draining => sd_notify::notify(&[NotifyState::Stopping, status]),
    };
    if let Err(error) = told {
        tracing::warn!(%error, stage = stage.name(), "cannot tell systemd");
    }
}
