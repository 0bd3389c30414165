//! Words for the log.

use pingora_core::{Error, ErrorType};

/// The deepest cause of a failure in a few words: Pingora's own text repeats every layer.
#[must_use]
pub fn brief(error: &Error) -> String {
    let root = error.root_cause();
    let Some(root) = root.downcast_ref::<Error>() else { return root.to_string() };
    match (&root.etype, &root.context) {
        (ErrorType::HTTPStatus(status), _) => format!("status {status}"),
        (_, Some(context)) => context.as_str().to_owned(),
        (kind, None) => kind.as_str().to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_deepest_cause_is_told() {
        let refused = std::io::Error::from_raw_os_error(111);
        let inner = Error::because(ErrorType::ConnectRefused, "to 10.0.0.1", refused);
        let outer = Error::because(ErrorType::ConnectError, "layer", inner);
        assert_eq!(brief(&outer), "Connection refused (os error 111)");
        let status = Error::explain(ErrorType::HTTPStatus(503), "not the expected status");
        assert_eq!(brief(&status), "status 503");
        let plain = Error::explain(ErrorType::ReadTimedout, "no answer in 5s");
        assert_eq!(brief(&plain), "no answer in 5s");
        assert_eq!(brief(&Error::new(ErrorType::ConnectionClosed)), "ConnectionClosed");
    }
}
