//! Owns how addresses are written on the command line: `HOST:PORT` to listen on, and the same with
//! or without `http://` to ask. Opens no connection.

use std::fmt;

/// A host, as a name or a number, and a port.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Address {
    /// Name or IP address; IPv6 without its brackets.
    pub(super) host: String,
    /// Port.
    pub(super) port: u16,
}

/// Why text is no address.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum AddressError {
    /// No colon, nothing before it or nothing behind it.
    #[error("must be HOST:PORT, for example 127.0.0.1:50051, got {0:?}")]
    Form(String),
    /// Colons in the host outside brackets.
    #[error("must have an IPv6 address in brackets, for example [::1]:50051, got {0:?}")]
    Brackets(String),
    /// No port there is.
    #[error("must have a port from {least} to 65535, got {port:?}")]
    Port {
        /// As written.
        port: String,
        /// Least that would do.
        least: u16,
    },
    /// Encryption is wanted.
    #[error(
        "TLS is not supported yet, so https:// cannot be asked: use http://, over a network you \
         trust or through a proxy that speaks TLS"
    )]
    Tls,
    /// Another protocol.
    #[error("must begin with http:// or be HOST:PORT alone, got {0}://")]
    Scheme(String),
}

impl Address {
    /// Reads an address to listen on; port 0 is a free one.
    ///
    /// # Errors
    /// [`AddressError`].
    pub(super) fn to_listen_on(text: &str) -> Result<Self, AddressError> {
        Self::parse(text, 0)
    }

    /// Reads the address of a server, with or without `http://`.
    ///
    /// # Errors
    /// [`AddressError`].
    pub(super) fn to_ask(text: &str) -> Result<Self, AddressError> {
        let rest = match text.split_once("://") {
            None => text,
            Some((scheme, rest)) if scheme.eq_ignore_ascii_case("http") => rest,
            Some((scheme, _)) if scheme.eq_ignore_ascii_case("https") => {
                return Err(AddressError::Tls);
            }
            Some((scheme, _)) => return Err(AddressError::Scheme(scheme.to_owned())),
        };
        Self::parse(rest.strip_suffix('/').unwrap_or(rest), 1)
    }

    /// As gRPC wants it.
    pub(super) fn url(&self) -> String {
        format!("http://{self}")
    }

    fn parse(text: &str, least_port: u16) -> Result<Self, AddressError> {
        let form = || AddressError::Form(text.to_owned());
        let (host, port) = text.rsplit_once(':').ok_or_else(form)?;
        let bare = host.strip_prefix('[').and_then(|host| host.strip_suffix(']'));
        if bare.is_none() && host.contains(':') {
            return Err(AddressError::Brackets(text.to_owned()));
        }
        let host = bare.unwrap_or(host);
        let is_odd = |c: char| c.is_whitespace() || c.is_control() || "/@?#\\".contains(c);
        let is_bracketed = host.contains(['[', ']']);
        if host.is_empty() || port.is_empty() || is_bracketed || text.contains(is_odd) {
            return Err(form());
        }
        let number = port.parse().ok().filter(|number| *number >= least_port);
        let wrong = || AddressError::Port { port: port.to_owned(), least: least_port };
        Ok(Self { host: host.to_owned(), port: number.ok_or_else(wrong)? })
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.host.contains(':') {
            true => write!(f, "[{}]:{}", self.host, self.port),
            false => write!(f, "{}:{}", self.host, self.port),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{Address, AddressError};

    #[test]
    fn addresses_of_servers_are_plain_http() {
        for text in ["http://localhost:50051/", "localhost:50051", "HTTP://localhost:50051"] {
            let address = Address::to_ask(text).expect(text);
            assert_eq!(address.url(), "http://localhost:50051");
        }
        assert_eq!(Address::to_ask("[::1]:7").expect("valid").url(), "http://[::1]:7");
        assert_eq!(Address::to_ask("https://a:1"), Err(AddressError::Tls));
        assert_eq!(Address::to_ask("ftp://a:1"), Err(AddressError::Scheme("ftp".to_owned())));
    }

    #[test]
    fn wrong_addresses_are_told_apart() {
        for text in ["localhost", "", ":1", "a:", "http://a:1/path", "u@a:1", "http://"] {
            assert!(matches!(Address::to_ask(text), Err(AddressError::Form(_))), "{text}");
        }
        assert!(matches!(Address::to_ask("::1:50051"), Err(AddressError::Brackets(_))));
        for text in ["a:0", "a:65536", "a:x"] {
            assert!(matches!(Address::to_ask(text), Err(AddressError::Port { .. })), "{text}");
        }
        assert_eq!(Address::to_listen_on("a:0").expect("a free one").port, 0);
    }
}
