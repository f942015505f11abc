//! Owns the addresses that `serve` listens on, checked. Opens no socket.

use super::address::{Address, AddressError};
use crate::config::{ConfigError, ServeFlags};

/// Where to listen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Listen {
    /// For everything.
    pub(super) main: Address,
    /// For probes and metrics alone, if wanted.
    pub(super) http: Option<Address>,
}

impl Listen {
    /// Checks the addresses.
    ///
    /// # Errors
    /// [`ConfigError`] for one that cannot be used.
    pub(super) fn new(flags: &ServeFlags) -> Result<Self, ConfigError> {
        let wrong = |flag| move |error: AddressError| ConfigError::new(flag, error.to_string());
        let main = Address::to_listen_on(&flags.listen).map_err(wrong("listen"))?;
        let http = flags.http_listen.as_deref().map(Address::to_listen_on);
        let http = http.transpose().map_err(wrong("http-listen"))?;
        if http.as_ref() == Some(&main) && main.port != 0 {
            let problem = format!("is the address of --listen ({main}) too: give it another port");
            return Err(ConfigError::new("http-listen", problem));
        }
        Ok(Self { main, http })
    }
}
