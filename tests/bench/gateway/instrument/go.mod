module bench-instrument

go 1.22
