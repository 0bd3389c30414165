//! What may stop an exchange from outside.

/// Why an exchange was stopped from outside.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::proxy) enum Stop {
    /// `client.body_timeout` is over.
    Upload,
    /// `deadlines.first_byte` is over.
    FirstByte,
    /// `deadlines.silence` is over.
    Silence,
    /// `deadlines.exchange` is over.
    Exchange,
    /// `deadlines.websocket_idle` is over.
    WebsocketIdle,
    /// `deadlines.websocket_total` is over.
    WebsocketTotal,
    /// The drain is over.
    Drain,
}

pub(super) const STOPS: [Stop; 7] = [
    Stop::Upload,
    Stop::FirstByte,
    Stop::Silence,
    Stop::Exchange,
    Stop::WebsocketIdle,
    Stop::WebsocketTotal,
    Stop::Drain,
];

impl Stop {
    /// Whether it ends the exchange, and not only the attempt of a backend that took too long.
    pub(in crate::proxy) fn is_final(self) -> bool {
        !matches!(self, Self::FirstByte | Self::Silence)
    }

    /// Whether it ends the exchange whatever the client still has to take.
    pub(super) fn ends_writing(self) -> bool {
        matches!(self, Self::Exchange | Self::WebsocketTotal)
    }
}
