#!/usr/bin/perl
# A web application with one page made from a template.
use Mojolicious::Lite -signatures;

app->secrets(['obdlab']);
get '/' => sub ($c) { $c->render(template => 'page', name => 'seven') };
app->start;

__DATA__
@@ page.html.ep
<!doctype html><title>obdlab</title><p><%= $name %>
