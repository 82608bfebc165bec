# The lock table of the server is of a fixed size: a migration that needs more locks at
# once than it has room for is refused before anything is changed; one that finds it
# too full later leaves everything as it is, and goes on when there is room.

use strict;
use warnings;

use LabServer;
use Test::More;

# room for 220 locks to 17, 360 from 18 on
my $node = start_server('lock_table', q{
autovacuum = off
max_connections = 10
max_locks_per_transaction = 10
max_prepared_transactions = 0
max_wal_senders = 0
max_worker_processes = 8
});
my ($status, $out, $err);

sub make_table
{
	my ($name, $partitions) = @_;
	sql("CREATE TABLE $name (id int, day int, v varchar(40), PRIMARY KEY (day, id)) PARTITION BY RANGE (day)");
	sql("DO 'BEGIN FOR i IN 0 .. $partitions - 1 LOOP
		EXECUTE format(''CREATE TABLE ${name}_%1\$s PARTITION OF $name FOR VALUES FROM (%1\$s) TO (%1\$s + 1)'', i); COMMIT; END LOOP; END'");
	return;
}

sub type_of { my ($name) = @_; return sql("SELECT format_type(atttypid, NULL) FROM pg_attribute WHERE attrelid = '$name'::regclass AND attname = 'v'") }

# ---------------------------------------------------------------------------
# Too many partitions
# ---------------------------------------------------------------------------

my $room;
make_table('many', 200);
for my $method ('online_rewrite', 'three_step')
{
	($status, $out, $err) = $node->psql('postgres', qq{\\set VERBOSITY verbose\nCALL rm_alter_type('many', 'v', 'int', 'v::int', method => '$method')});
	like($err, qr/ERROR:  53400: the server's lock table has no room for the locks that $method needs on public\.many$/m, "$method is refused");
	(my $needed, $room) = $err =~ /^DETAIL:  It holds about (\d+) locks at once, on the table, all below it, and what belongs to them\. There is room for (\d+), and others hold \d+ now\.$/m;
	cmp_ok($needed, '>', $room, "$method: it is told how many locks it needs");
	my ($setting) = $err =~ /^HINT:  Set max_locks_per_transaction to (\d+) or more \(it is 10\) and restart the server\.$/m;
	cmp_ok($setting * $room / 10, '>=', $needed, "$method: what it says would do");
}
is(sql(q{SELECT (SELECT count(*) FROM rm_migrations), (SELECT count(*) FROM pg_class WHERE relname ~ '^(shadow|log)_\d'), (SELECT count(*) FROM pg_trigger WHERE tgname ~ '^~rm_')}),
	'0|0|0', 'nothing has begun');

# ---------------------------------------------------------------------------
# Others hold too many
# ---------------------------------------------------------------------------

sub fill_lock_table
{
	# what is left is less than any migration needs
	my $call = start_call('holder', "SELECT count(pg_advisory_lock(g)) FROM generate_series(1, $room - 60) g", 'SELECT pg_sleep(600)');
	wait_for("EXISTS (SELECT FROM pg_stat_activity WHERE application_name = 'holder' AND wait_event = 'PgSleep')", 'the locks are not taken');
	return $call;
}

sub empty_lock_table
{
	my ($call) = @_;
	sql("SELECT pg_terminate_backend(pid, 60000) FROM pg_stat_activity WHERE application_name = 'holder'");
	finish_call($call);
	return;
}

# a session that does nothing, with a snapshot
sub start_old_snapshot
{
	my $call = start_call('old', 'BEGIN ISOLATION LEVEL REPEATABLE READ', 'SELECT pg_sleep(600)');
	wait_for("EXISTS (SELECT FROM pg_stat_activity WHERE application_name = 'old' AND wait_event = 'PgSleep')", 'there is no snapshot');
	return $call;
}

# the last step of all is to come; the table is used meanwhile
sub stands_still
{
	my ($name, $sqlstate, $what) = @_;
	is(sql(q{SELECT state, sqlstate, next_call ~ '^(CALL rm_(cut_over|swap)|SELECT rm_resume)\(\d+\)$' FROM rm_migrations ORDER BY id DESC LIMIT 1}),
		"open|$sqlstate|t", "$what: it says how to go on");
	is(type_of($name), 'character varying', "$what: the column is what it was");
	sql("INSERT INTO $name SELECT max(id) + 1, 1, (max(id) + 1) * 3 FROM $name; DELETE FROM $name WHERE id = (SELECT min(id) FROM $name)");
	return;
}

sub goes_on
{
	my ($name, $call, $what) = @_;
	sql($call);
	is(type_of($name), 'integer', "$what: it goes on to the end");
	is(sql("SELECT count(*) > 90, count(*) FILTER (WHERE v = id * 3) = count(*) FROM $name"), 't|t', "$what: every row has its value");
	return;
}

for my $method ('online_rewrite', 'three_step')
{
	my $holder;
	my $name = "few_$method";

	make_table($name, 4);
	sql("INSERT INTO $name SELECT g, g % 4, g * 3 FROM generate_series(1, 100) g");
	$holder = fill_lock_table();
	($status, $out, $err) = $node->psql('postgres', "CALL rm_alter_type('$name', 'v', 'int', 'v::int', method => '$method')");
	my ($others) = $err =~ /no room for the locks that $method needs.*others hold (\d+) now/s;
	cmp_ok($others // 0, '>=', $room - 60, "$method: what others hold counts") or diag $err;
	empty_lock_table($holder);

	sql("CALL rm_alter_type('$name', 'v', 'int', 'v::int', method => '$method', cut_over => 'manual')");
	$holder = fill_lock_table();
	($status, $out, $err) = $node->psql('postgres', 'CALL rm_cut_over()');
	like($err, qr/no room for the locks that $method needs.*HINT:  Wait until others hold fewer, then SELECT rm_resume\(\d+\); or set max_locks_per_transaction/s,
		"$method: it does not take what others may need");
	stands_still($name, '53400', "$method finds no room");
	empty_lock_table($holder);

	my $old = start_old_snapshot();
	my $cut = start_call('cut', 'CALL rm_cut_over()');
	wait_for("EXISTS (SELECT FROM rm_progress WHERE waiting_for = 'snapshot')", 'nobody is waited for');
	$holder = fill_lock_table();
	sql("SELECT pg_terminate_backend(pid, 60000) FROM pg_stat_activity WHERE application_name = 'old'");
	finish_call($_) for $old, $cut;
	like($cut->{err}, qr/53400: the server's lock table has no room/, "$method: it looks again just before");
	stands_still($name, '53400', "$method has waited");
	empty_lock_table($holder);

	# whatever is asked beforehand, others may take the rest at any time
	sql(q{
		CREATE FUNCTION take_all() RETURNS event_trigger LANGUAGE plpgsql AS
			'BEGIN PERFORM pg_advisory_xact_lock(g) FROM generate_series(1, 1000000) g; END';
		CREATE EVENT TRIGGER take_all ON ddl_command_start WHEN TAG IN ('ALTER TABLE') EXECUTE FUNCTION take_all()});
	($status, $out, $err) = $node->psql('postgres', 'CALL rm_cut_over()');
	like($err, qr/out of shared memory\nDETAIL:  The lock table is full\. Nothing was changed by the last transaction of step \w+\.\nHINT:  Wait until others hold fewer locks, or raise max_locks_per_transaction \(it is 10\)/,
		"$method: it says what has filled up");
	stands_still($name, '53200', "$method fails in the middle");
	sql('DROP EVENT TRIGGER take_all; DROP FUNCTION take_all()');
	goes_on($name, 'CALL rm_cut_over()', $method);
	sql('CALL rm_cleanup()') if $method eq 'three_step';
}

$node->stop;
done_testing();
