# The first lock of a call is asked for like all others: not for longer than
# lock_timeout at a time, and again after a pause.  And two sessions that fill
# the lab do not both fill it.

use strict;
use warnings;

use LabServer;
use Test::More;

my $node = start_lab('first_lock', 100, '');

# The condition that the session of that name asks for a lock on the table that
# it does not get.
sub waits
{
	my ($name) = @_;
	return qq{EXISTS (SELECT FROM pg_locks JOIN pg_stat_activity USING (pid)
		WHERE application_name = '$name' AND relation = 'large_record'::regclass AND NOT granted)};
}

# A session that keeps the table to itself until end_holder().
sub start_holder
{
	my $holder = start_call('holder', 'BEGIN', 'LOCK TABLE large_record', 'SELECT pg_sleep(3600)');
	wait_for(q{EXISTS (SELECT FROM pg_locks JOIN pg_stat_activity USING (pid)
		WHERE application_name = 'holder' AND relation = 'large_record'::regclass AND granted)},
		'nobody locks the table');
	return $holder;
}

sub end_holder
{
	my ($holder) = @_;
	sql(q{SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'holder'});
	finish_call($holder);
	return;
}

for my $statement ("CALL rm_migrate('0003')", "CALL rm_migrate('0001')", "CALL rm_migrate('0002')",
	"CALL rm_migrate('0001')",
	"CALL rm_add_column('large_record', 'created_at', 'timestamp', 'created_at::timestamp')")
{
	my $holder = start_holder();
	my $call = start_call('call', 'SET risky_migrations.lock_retries = 100000',
		q{SET risky_migrations.lock_retry_max_delay = '500 ms'}, $statement);
	becomes(waits('call'), "$statement asks for its lock");
	becomes('NOT ' . waits('call'), '... and lets others through again');
	becomes(waits('call'), '... and asks once more');
	end_holder($holder);
	ends_well($call, '... and comes through when the table is free');
}

# with the tries used up, one clear error
sql('CALL rm_rollback()');
my $holder = start_holder();
my ($status, undef, $err) = $node->psql('postgres',
	"SET risky_migrations.lock_retries = 1; SET risky_migrations.lock_timeout = 50; CALL rm_migrate('0003')");
isnt($status, 0, 'gives up in the end');
like($err, qr/ERROR: .*lock timeout.*DETAIL: .*2 tries.*HINT: .*rm_blocked_queries/s, 'and says so');
end_holder($holder);
is(sql(q{SELECT count(*) FROM rm_migrations WHERE state = 'open'}), '0', 'nothing is left open');

# the second one to fill the lab is told
my $seeding = start_call('seeding', 'BEGIN', 'SELECT rm_seed(1000)', 'SELECT pg_sleep(3600)');
wait_for('(SELECT count(*) FROM pg_locks WHERE objsubid = 6) = 1', 'nobody seeds');
(undef, undef, $err) = $node->psql('postgres', '\set VERBOSITY verbose
SELECT rm_seed(500)');
like($err, qr/55006: the lab in schema "public" is being seeded/, 'a second rm_seed is refused');
sql(q{SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'seeding'});
finish_call($seeding);
is(sql('SELECT rm_seed(500)'), '500', 'and not when the first has ended');
is(sql('SELECT count(*) FROM large_record'), '500', 'the rows are there once');

# who stood behind a lock has the processors first, when it is gone
my $writer_holds = start_call('holder', 'BEGIN', 'LOCK TABLE large_record IN ROW EXCLUSIVE MODE', 'SELECT pg_sleep(3600)');
wait_for(q{EXISTS (SELECT FROM pg_locks JOIN pg_stat_activity USING (pid)
	WHERE application_name = 'holder' AND relation = 'large_record'::regclass AND granted)}, 'nobody locks the table');
my $call = start_call('call', q{SET risky_migrations.lock_timeout = '60 s'},
	q{CALL rm_alter_type('large_record', 'created_at', 'timestamp', 'created_at::timestamp', method => 'online_rewrite')});
becomes(waits('call'), 'online_rewrite asks for its first strong lock');
my $writer = start_call('writer', 'DELETE FROM large_record WHERE id < 0');
becomes(waits('writer'), 'a writer stands behind it');
end_holder($writer_holds);
ends_well($call, 'online_rewrite comes through');
finish_call($writer);
is(sql(q{SELECT duration_ms >= 45 FROM risky_migrations.step_log WHERE step = 'copy' ORDER BY id DESC LIMIT 1}),
	't', 'and rests after the step in which somebody stood behind it');

$node->stop;
done_testing();
